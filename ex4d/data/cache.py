"""Cache byte ranges of an object store in a bounded folder, which several processes of a machine may share."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from ex4d import storage
from ex4d.errors import ConfigError

MARKER = ".ex4d-cache"
_ENTRY = re.compile(r"[0-9a-f]{64}")
_OURS = re.compile(r"[0-9a-f]{64}(\.range)?|\.tmp-[0-9a-f].*|" + re.escape(MARKER))  # also what earlier versions wrote


def claim(folder: Path, key: str) -> Path:
    """Make `folder` a cache that only this user can read, and return it; never touch files of others.

    Args:
        key: the setting that names the folder, for messages.

    Raises:
        ConfigError: the folder is a link, belongs to another user, or holds files that are not this project's.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise ConfigError(key, str(folder), "is a link; name the folder itself")
    if facts.st_uid != os.getuid():
        raise ConfigError(key, str(folder), "belongs to another user")
    if not (folder / MARKER).is_file():
        foreign = next((name for name in os.listdir(folder) if not _OURS.fullmatch(name)), None)
        if foreign is not None:
            raise ConfigError(
                key, str(folder), f"holds {foreign!r}, so it is not a cache of this project; name an empty folder"
            )
        (folder / MARKER).touch(mode=0o600)
    folder.chmod(0o700)
    return folder


def least_used_first(folder: Path) -> list[tuple[int, Path]]:
    """Return (bytes, path) of the files that a cache may evict, oldest access first.

    These are regular files whose name is 64 hexadecimal digits, or that lie in a folder with such a name; links are
    neither counted nor followed.
    """
    files = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        named = [entry for entry in entries if _ENTRY.fullmatch(entry.name)]
        for entry in named:
            with suppress(FileNotFoundError, NotADirectoryError):  # another process was faster
                inside = list(os.scandir(entry)) if entry.is_dir(follow_symlinks=False) else [entry]
                for file in inside:
                    facts = file.stat(follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode):
                        files.append((facts.st_mtime_ns, facts.st_size, Path(file.path)))
    return [(size, path) for _, size, path in sorted(files)]


class RangeCache:
    """A cache of byte ranges in a folder; when it is full, the least recently used ranges are evicted.

    Threads that need the same range at the same time share one read: around the end of an epoch, a sample may be needed
    twice. Processes do not wait for each other.

    Args:
        folder: created if it does not exist; see `claim`.
        max_bytes: size limit; each process may exceed it by 1 % between two checks.
        identity: of the dataset, so that another dataset at the same URL is not mistaken for this one.
    """

    def __init__(self, folder: str | Path, max_bytes: int, identity: str):
        self.folder, self.max_bytes, self.identity = claim(Path(folder), "train.loader.cache_dir"), max_bytes, identity
        self._added = 0
        self._lock = threading.Lock()
        self._under_way: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()
        self._evict()

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Return the bytes from the cache, else with one ranged read from `url`."""
        path = self._path(url, offset, length)
        with self._lock:
            under_way = self._under_way.setdefault(path, threading.Lock())
        with under_way:
            try:
                data = path.read_bytes()
                os.utime(path)  # most recently used
                return data
            except FileNotFoundError:
                pass
            data = storage.read_bytes(url, offset, length)
            if len(data) <= self.max_bytes:
                storage.write_bytes(path, data)
                with self._lock:
                    self._added += len(data)
                    if self._added * 100 >= self.max_bytes:
                        self._evict()
        return data

    def forget(self, url: str, offset: int, length: int) -> None:
        """Delete a range whose bytes were wrong."""
        self._path(url, offset, length).unlink(missing_ok=True)

    def _path(self, url: str, offset: int, length: int) -> Path:
        name = hashlib.sha256(f"{self.identity} {url} {offset} {length}".encode()).hexdigest()
        return self.folder / name

    def _evict(self) -> None:
        files = least_used_first(self.folder)
        total = sum(size for size, _ in files)
        for size, path in files:
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._added = 0
