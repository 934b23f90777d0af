"""Cache remote files on this machine, because decoders need a local path.

Files are copied once and stay while there is room. All processes on a machine share the cache; a file in use is never
evicted. A folder of pictures is cached as one file, too (`video.pictures`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO

from ex4d import remote, storage, web
from ex4d.data.cache import claim, least_used_first
from ex4d.errors import BadSample
from ex4d.video import pictures

OLD_S = 86400  # temporary files older than a day are abandoned
MAX_TRIES = 10  # attempts to lock a file before another process evicts it
MAX_NAME_BYTES = 200  # names in a store may be longer than a disk allows


def unreadable(error: OSError) -> BadSample:
    """Return the BadSample for an error of a file or store; its text does not depend on time or machine."""
    if isinstance(error, web.PrivateHost):
        return BadSample("private_host", f"the host {error.strerror}")
    if isinstance(error, storage.TooLarge):
        return BadSample("file_too_large", "has more bytes than preprocess.max_file_mb allows")
    if isinstance(error, storage.Truncated):
        return BadSample("truncated_download", "other bytes came than were announced")
    if isinstance(error, remote.Unavailable):
        return BadSample("unreadable", "the store does not answer")
    return BadSample("unreadable", f"{error.strerror}")


class FileCache:
    """A bounded folder of whole files, each stored under its sha256; the least recently used are evicted first.

    Args:
        folder: created if missing; see `claim`.
        max_bytes: limit of the cache, besides files in use (one video, one depth file per process) and one in transfer.
        max_file_bytes: larger files are rejected.
    """

    def __init__(self, folder: Path, max_bytes: int, max_file_bytes: int):
        self.folder, self.max_bytes, self.max_file_bytes = folder, max_bytes, max_file_bytes
        claim(folder, "preprocess.cache_dir")
        self._held: dict[str, IO[bytes]] = {}
        for path in folder.glob(".tmp-[0-9a-f]*"):  # left by killed processes; recent ones may still be in use
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > OLD_S:
                    path.unlink()

    def get(self, url: str, sha256: str, name: str, fps: float | None = None) -> Path:
        """Return the path of a file with that content, locked until the next file of its kind is requested.

        Args:
            fps: for a local folder of pictures; None for a file.

        Raises:
            BadSample: unreadable, truncated_download; source_changed: the URL now has other content.
        """
        path = self._path(sha256, name)
        for _ in range(MAX_TRIES):
            if self._hold(path, name):
                return path
            try:
                found, _ = self.add(url, name, fps=fps)
            except OSError as error:
                raise unreadable(error) from None
            if found != sha256:
                raise BadSample("source_changed", "the content has changed since it was hashed")
        raise BadSample("unreadable", "other processes evicted it before it was used; increase preprocess.cache_mb")

    def add(self, url: str, name: str, announced: int | None = None, fps: float | None = None) -> tuple[str, int]:
        """Copy a file to the cache; return (sha256, bytes). `announced`: its size, None: query it. Raises OSError."""
        announced = pictures.size_of(url) if fps else announced
        claim(self.folder, "preprocess.cache_dir")  # the folder may have been deleted
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        announced = announced if announced is not None else size_or_0(url)
        if announced > self.max_file_bytes:
            raise storage.TooLarge(errno.EFBIG, f"more than {self.max_file_bytes} bytes", remote.redacted(url))
        self._make_room(announced)
        try:
            if fps is None:
                sha256 = storage.sha256(url, copy_to=temporary, max_bytes=self.max_file_bytes)
            else:
                with open(temporary, "xb") as file:
                    sha256, _ = pictures.digest(url, fps, file, self.max_file_bytes)
            size_bytes = temporary.stat().st_size
            path = self._path(sha256, name)
            _move(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return sha256, size_bytes

    def _path(self, sha256: str, name: str) -> Path:
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            name = f"long{os.path.splitext(name)[1]}"
        return self.folder / sha256 / name

    def _hold(self, path: Path, kind: str) -> bool:
        """Lock the file against eviction by any process; return False if it does not exist."""
        kind = "video" if kind == "video" else "depth"
        try:
            file = open(path, "rb")  # noqa: SIM115 (kept open: that is the lock)
        except FileNotFoundError:
            return False
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:  # it was deleted between open and lock
            file.close()
            return False
        os.utime(path)
        previous, self._held[kind] = self._held.get(kind), file
        if previous is not None:
            previous.close()
        return True

    def _make_room(self, wanted_bytes: int) -> None:
        files = least_used_first(self.folder)
        total = sum(size for size, _ in files)
        for size, path in files:
            if total + wanted_bytes <= self.max_bytes:
                return
            if _drop(path):
                total -= size


def _drop(path: Path) -> bool:
    """Delete a file unless it is locked; return True if it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    with suppress(OSError):  # not empty
        path.parent.rmdir()
    return True


def _move(source: Path, target: Path) -> None:
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(source, target)
            return
        except FileNotFoundError:  # another process removed the new folder while it was empty
            if not source.exists():
                raise


def size_or_0(url: str) -> int:
    """Return the bytes of a file; 0 if it is missing or the server does not say, so that reading it fails later."""
    try:
        return storage.size(url)
    except OSError:
        return 0
