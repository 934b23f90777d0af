"""Files by path or URL, local or in an object store, with atomic writes. The only gate to fsspec.

A URL is a local path or `scheme://…`. Writes appear whole or not at all: on a local disk by a temporary file and
rename, in an object store because a put is atomic there.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec

from ex4d.errors import ConfigError

SCHEMES = ("file", "s3", "gs", "gcs", "hf", "http", "https", "memory")


def is_local(url: str | Path) -> bool:
    """Return True where `url` is a path on this machine."""
    return "://" not in str(url) or str(url).startswith("file://")


def local_path(url: str | Path) -> Path:
    """Return the path of a local URL."""
    return Path(str(url).removeprefix("file://"))


def join(url: str | Path, *parts: str) -> str:
    """Return `url` with path parts appended."""
    return "/".join([str(url).rstrip("/"), *parts])


def _filesystem(url: str | Path) -> tuple[Any, str]:
    scheme = str(url).partition("://")[0] if "://" in str(url) else "file"
    if scheme not in SCHEMES:
        raise ConfigError("url", str(url), f"allowed schemes: {', '.join(SCHEMES)}")
    try:
        return fsspec.core.url_to_fs(str(local_path(url)) if is_local(url) else str(url))
    except ImportError as error:
        raise ConfigError(
            "url", str(url), f"{scheme}:// needs a package that is not installed here ({error})"
        ) from error


def open_read(url: str | Path) -> IO[bytes]:
    """Return a seekable binary reader. The caller closes it."""
    filesystem, path = _filesystem(url)
    return filesystem.open(path, "rb")


def exists(url: str | Path) -> bool:
    """Return True where a file or folder is there."""
    filesystem, path = _filesystem(url)
    return filesystem.exists(path)


def read_bytes(url: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """Return `length` bytes (all that follow when None) from `offset` on, by one ranged read."""
    if is_local(url):
        with open(local_path(url), "rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)
    filesystem, path = _filesystem(url)
    return filesystem.cat_file(path, start=offset or None, end=None if length is None else offset + length)


def write_bytes(url: str | Path, data: bytes) -> None:
    """Write a whole file atomically, making its folders."""
    if is_local(url):
        with atomic_path(local_path(url)) as temporary:
            temporary.write_bytes(data)
        return
    filesystem, path = _filesystem(url)
    filesystem.pipe_file(path, data)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary local path beside `path`; on success it is flushed to disk and renamed, else removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, since encoders choose their container by it.
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
    filesystem, path = _filesystem(url)
    filesystem.put_file(str(source), path)
    source.unlink()


def list_files(url: str | Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Return every file under a folder, sorted, as paths relative to it with forward slashes.

    Args:
        suffixes: keep only names ending so, lower case with the dot; () keeps all.
    """
    filesystem, path = _filesystem(url)
    root = PurePosixPath(path.replace(os.sep, "/"))
    found = [str(PurePosixPath(name.replace(os.sep, "/")).relative_to(root)) for name in filesystem.find(path)]
    return sorted(
        name
        for name in found
        if (not suffixes or name.lower().endswith(suffixes)) and not name.rpartition("/")[2].startswith(".tmp-")
    )


def remove(url: str | Path) -> None:
    """Delete one file; nothing happens where it is not there."""
    filesystem, path = _filesystem(url)
    if filesystem.exists(path):
        filesystem.rm_file(path)


def sha256(url: str | Path) -> str:
    """Return the hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with open_read(url) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
