"""A bounded folder of byte ranges read from an object store. Several processes of one machine may share it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakValueDictionary

from ex4d import storage


def least_used_first(paths: Iterable[Path]) -> list[tuple[int, Path]]:
    """Return (bytes, path) of the files that are still there, by when they were touched last."""
    files = []
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        files.append((stat.st_mtime_ns, stat.st_size, path))
    return [(size, path) for _, size, path in sorted(files)]


class RangeCache:
    """Reads of byte ranges, kept in a folder until it is full; then the least recently used go.

    Threads that want the same range at the same time wait for the one that reads it: where one epoch ends and the next
    begins, a sample may be asked for twice within a few places. Processes do not wait for each other.

    Args:
        folder: made when it is not there. Only files that this class wrote may lie in it.
        max_bytes: kept at most, save for a hundredth that each process may add between two looks at the folder.
        identity: of the dataset, so that another dataset at the same URL is not mistaken for this one.
    """

    def __init__(self, folder: str | Path, max_bytes: int, identity: str):
        self.folder, self.max_bytes, self.identity = Path(folder), max_bytes, identity
        self.folder.mkdir(parents=True, exist_ok=True)
        self._added = 0
        self._lock = threading.Lock()
        self._under_way: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()
        self._evict()

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Return the bytes from the folder, else by one ranged read from `url`."""
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
        """Drop a range whose bytes turned out to be wrong."""
        self._path(url, offset, length).unlink(missing_ok=True)

    def _path(self, url: str, offset: int, length: int) -> Path:
        name = hashlib.sha256(f"{self.identity} {url} {offset} {length}".encode()).hexdigest()
        return self.folder / f"{name}.range"

    def _evict(self) -> None:
        files = least_used_first(self.folder.glob("*.range"))
        total = sum(size for size, _ in files)
        for size, path in files:
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._added = 0
