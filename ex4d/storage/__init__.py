"""Read and write files by path or URL, local or in an object store, with atomic writes.

A URL is a local path or `scheme://…`. Writes appear whole or not at all: on a local disk by a temporary file and
rename, in an object store because a put is atomic there, even if retried. Transient failures are retried
(`remote.ATTEMPTS`). Credentials and endpoints come from where each store's own tools look for them: for S3 and
compatible stores AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, or fsspec's configuration.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ex4d import remote
from ex4d.remote import TooLarge as TooLarge
from ex4d.remote import Truncated as Truncated
from ex4d.storage.listing import glob as glob
from ex4d.storage.listing import list_files as list_files
from ex4d.storage.listing import list_sizes as list_sizes
from ex4d.storage.urls import BUCKETS, is_web
from ex4d.storage.urls import check_url as check_url
from ex4d.storage.urls import filesystem_of as filesystem_of
from ex4d.storage.urls import is_local as is_local
from ex4d.storage.urls import join as join
from ex4d.storage.urls import local_path as local_path

SHA256 = re.compile(r"[0-9a-f]{64}")  # some hashes become parts of paths, so they are validated
BLOCK_BYTES = 4 * 2**20  # of one ranged read when a file is read from end to end


def open_read(url: str | Path) -> IO[bytes]:
    """Open a seekable binary reader, which the caller closes. Raises OSError, also for a pipe, a device or a folder."""
    if is_local(url):
        return _open_local(local_path(url))
    return io.BufferedReader(_Ranges(str(url)), BLOCK_BYTES)


def _open_local(path: Path) -> IO[bytes]:
    # Opening a pipe waits for a writer, perhaps forever, and a device has no end.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "Is not a regular file", str(path))
    return os.fdopen(fd, "rb")


class _Ranges(io.RawIOBase):
    """A remote file, read by ranges, each of which is retried if it fails."""

    def __init__(self, url: str):
        self.url, self.position = url, 0
        self.length = size(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.length - self.position)
        if wanted <= 0:
            return 0
        data = read_bytes(self.url, self.position, wanted)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def exists(url: str | Path) -> bool:
    """Return whether a file or folder exists."""
    if is_local(url):
        return local_path(url).exists()
    return _info(url) is not None


def is_file(url: str | Path) -> bool:
    """Return whether a file exists."""
    if is_local(url):
        return local_path(url).is_file()
    info = _info(url)
    return info is not None and info["type"] == "file"


def size(url: str | Path) -> int:
    """Return a file's size in bytes. Raises FileNotFoundError; OSError if a server does not tell it."""
    if is_local(url):
        return local_path(url).stat().st_size
    found, _ = size_and_tag(str(url))
    if found is None:
        raise OSError(95, "The server does not tell the size", remote.redacted(str(url)))
    return int(found)


def tag(url: str) -> str:
    """Return a remote file's tag of its content, without downloading it: "" if the store has none that proves it.

    Different contents of one URL have different tags: a strong ETag, or a hub's or bucket's hash of the bytes.
    """
    return _tag_of(_info(url) or {})


def size_and_tag(url: str) -> tuple[int | None, str]:
    """Return (a file's size in bytes, None if a server does not tell it; its `tag`). Raises FileNotFoundError."""
    info = _info(url)
    if info is None:
        raise FileNotFoundError(2, "No such file", remote.redacted(str(url)))
    return info["size"], _tag_of(info)


def beside(url: str) -> dict[str, tuple[int, str]] | None:
    """List the files beside a remote one that share its name up to the suffix, itself included, by one request.

    Returns: {name: (bytes, tag)}; None if the store cannot list by prefix, or the name has no suffix.
    """
    stem, suffix = os.path.splitext(url.rpartition("/")[2])
    if not str(url).startswith(BUCKETS) or not suffix:
        return None
    filesystem, path = filesystem_of(url)
    folder = path.rpartition("/")[0]
    try:
        found = remote.call(lambda: filesystem.find(folder, prefix=f"{stem}.", detail=True), url)
    except FileNotFoundError:
        return {}
    return {name.rpartition("/")[2]: (info["size"], _tag_of(info)) for name, info in found.items()}


def _tag_of(info: dict[str, Any]) -> str:
    found = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "blob_id") if info.get(key)), "")
    return "" if found.startswith("W/") or info.get("size") is None else f"{found} {info['size']}"


def _info(url: str | Path) -> dict[str, Any] | None:
    """Return the store's metadata of a file or folder, None if it does not exist.

    Not by fsspec's `exists`, which returns False on every error.
    """
    filesystem, path = filesystem_of(url)
    with suppress(FileNotFoundError):
        return remote.call(lambda: filesystem.info(path), str(url))
    return None


def read_bytes(url: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """Read `length` bytes (None: all that follow) from `offset` on, by one ranged read."""
    if is_local(url):
        with _open_local(local_path(url)) as file:
            file.seek(offset)
            # No more than exists: a length may come from an untrusted table, and would be allocated at once.
            there = max(0, os.fstat(file.fileno()).st_size - offset)
            return file.read() if length is None else file.read(min(length, there))
    filesystem, path = filesystem_of(url)
    if offset and length is None:
        length = max(0, size(url) - offset)
    if length == 0:
        return b""
    end = None if length is None else offset + length
    # A hub's reader would read ahead and discard the data; S3's would ask for the size first.
    odd: dict[str, dict[str, Any]] = {"hf://": {"cache_type": "none"}, "s3://": {} if end else {"max_concurrency": 1}}
    options = odd.get(str(url)[:5], {})
    data = remote.call(lambda: filesystem.cat_file(path, start=offset if end else None, end=end, **options), str(url))
    if length is not None and len(data) > length:  # a web server without ranges sent everything
        return data[offset : offset + length]
    return data


def no_links(path: str, flags: int) -> int:
    """Serve as the opener of `open(…, opener=no_links)`: refuse a link, which another user may have put there."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_bytes(url: str | Path, data: bytes) -> None:
    """Write a whole file atomically, creating its folders."""
    if is_local(url):
        with atomic_path(local_path(url)) as temporary:
            temporary.write_bytes(data)
        return
    filesystem, path = filesystem_of(url)
    remote.call(lambda: filesystem.pipe_file(path, data), str(url))


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary local path beside `path`; on success it is flushed to disk and renamed, else removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because encoders choose their container by it.
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def move_file(source: Path, url: str | Path) -> None:
    """Move a finished local file to `url`, whole or not at all: a rename on one disk, or an upload."""
    if is_local(url):
        target = local_path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        os.replace(source, target)
        return
    filesystem, path = filesystem_of(url)
    remote.call(lambda: filesystem.put_file(str(source), path), str(url))
    source.unlink()


def remove(url: str | Path) -> None:
    """Delete one file if it exists."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    filesystem, path = filesystem_of(url)
    with suppress(FileNotFoundError):
        remote.call(lambda: filesystem.rm_file(path), str(url))


def sha256(url: str | Path, copy_to: Path | None = None, max_bytes: int | None = None) -> str:
    """Return the hex sha256 of a file's content, read in bounded memory.

    Args:
        copy_to: a local file to which the content is also written.
        max_bytes: stop beyond this, because a stream may have no end; ignored when copying from S3, which has no such
            files.

    Raises:
        TooLarge: it has more than `max_bytes`.
        Truncated: a server sent another number of bytes than it had announced.
        OSError: cannot be read.
    """

    def once() -> str:
        digest, count = hashlib.sha256(), 0
        if copy_to is not None and str(url).startswith("s3://"):  # one request, instead of one per block
            filesystem, path = filesystem_of(url)
            filesystem.get_file(path, str(copy_to), max_concurrency=1)
            with open(copy_to, "rb") as copy:
                return hashlib.file_digest(copy, "sha256").hexdigest()
        with open(copy_to or os.devnull, "wb") as copy:
            for block in _blocks(url):
                count += len(block)
                if max_bytes is not None and count > max_bytes:
                    raise TooLarge(errno.EFBIG, f"more than {max_bytes} bytes", remote.redacted(str(url)))
                digest.update(block)
                copy.write(block)
        return digest.hexdigest()

    return once() if is_local(url) else remote.call(once, str(url))


def _blocks(url: str | Path) -> Iterator[bytes]:
    """Yield a file's content in order."""
    if is_web(url):
        yield from _stream(str(url))  # not every web server supports ranges
        return
    with open_read(url) as file:
        yield from iter(lambda: file.read(BLOCK_BYTES), b"")


def _stream(url: str) -> Iterator[bytes]:
    filesystem, path = filesystem_of(url)
    info, count = filesystem.info(path), 0
    with filesystem.open(path, "rb", block_size=0) as file:
        while block := file.read(BLOCK_BYTES):
            count += len(block)
            yield block
    if info.get("size") not in (None, count):
        raise Truncated(5, f"{count} bytes came of the {info['size']} that were announced", remote.redacted(url))
