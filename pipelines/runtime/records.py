"""Records of a ledger, many per file: `staging/records/NUMBER.records`, written by the driver alone.

A line is `CRC NAME JSON`; CRC is the CRC-32 of the rest, as 8 hex digits. A later line replaces an earlier one of the
same name, and `null` deletes the record. On a local disk, a run appends each line to a part as it is written, so that
records survive the process. An object store cannot append, so there a part is written every few seconds.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from ex4d import storage
from ex4d.threads import in_order

logger = logging.getLogger(__name__)

SUFFIX = ".records"
NUM_READERS = 16  # threads that read parts; an object store serves many reads at once
PART_EVERY_S = 10.0  # interval between two parts in an object store
PART_RECORDS = 5000  # maximum records of a part: parts are read whole


class Records:
    """The records of one ledger: {name: mapping}.

    They are kept in a scratch database on this machine, not in memory: a million videos have gigabytes of records.

    Args:
        scratch: the database.
        folder: where the parts are, local or in an object store.
        damaged: folder for copies of damaged parts.
    """

    def __init__(self, scratch: sqlite3.Connection, folder: str, damaged: str):
        self.folder, self.damaged, self._scratch = folder, damaged, scratch
        self._scratch.execute("CREATE TABLE record (name TEXT PRIMARY KEY, body TEXT)")
        self._waiting: list[bytes] = []
        self._file: int | None = None
        self._num_lines = 0
        self._written = time.monotonic()
        self._parts = storage.list_files(folder, (SUFFIX,))
        self._number = 1 + max((int(name[: -len(SUFFIX)]) for name in self._parts), default=0)
        for name, blob in zip(self._parts, in_order(self._read, self._parts, NUM_READERS), strict=True):
            self._take(name, blob)

    def __contains__(self, name: str) -> bool:
        return self._scratch.execute("SELECT 1 FROM record WHERE name = ?", (name,)).fetchone() is not None

    def __len__(self) -> int:
        return int(self._scratch.execute("SELECT COUNT(*) FROM record").fetchone()[0])

    def __iter__(self) -> Iterator[str]:
        """Yield the names, sorted."""
        return (name for (name,) in self._scratch.execute("SELECT name FROM record ORDER BY name"))

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a record, or None if there is none."""
        found = self._scratch.execute("SELECT body FROM record WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def add(self, name: str, body: Mapping[str, Any]) -> None:
        """Write a record; in an object store possibly some seconds later, see `flush`."""
        text = json.dumps(body, sort_keys=True)
        self._scratch.execute("INSERT OR REPLACE INTO record VALUES (?, ?)", (name, text))
        self._append(_line(name, text))

    def forget(self, name: str) -> None:
        """Delete a record."""
        self._scratch.execute("DELETE FROM record WHERE name = ?", (name,))
        self._append(_line(name, "null"))

    def flush(self) -> None:
        """Write all pending records, and finish the current part."""
        if self._waiting:
            self._write_part(b"".join(self._waiting))
            self._waiting = []
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file, self._num_lines = None, 0

    def lines(self, prefix: str) -> Iterator[str]:
        """Yield `NAME JSON` of all records of videos, clips and scores whose key begins with `prefix`."""
        for folder in ("clips", "scores", "videos"):
            first = f"{folder}/{prefix}"
            bounds = (first, f"{first}\x7f")
            rows = self._scratch.execute("SELECT name || ' ' || body FROM record WHERE name BETWEEN ? AND ?", bounds)
            yield from (line for (line,) in rows)

    def rewrite(self) -> None:
        """Write all records as new parts of PART_RECORDS, and delete the old parts."""
        self.flush()
        old = list(self._parts)
        rows = self._scratch.execute("SELECT name, body FROM record ORDER BY name")
        while some := rows.fetchmany(PART_RECORDS):
            self._write_part(b"".join(_line(name, body) for name, body in some))
        for name in old:  # oldest first: after an interruption, deleted records must not come back
            storage.remove(storage.join(self.folder, name))
        self._parts = [name for name in self._parts if name not in old]

    def _read(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.folder, name))

    def _take(self, part: str, blob: bytes) -> None:
        """Load the lines of a part into the scratch database; if any is damaged, copy the part aside and repair it."""
        lines = blob.splitlines(keepends=True)
        good = [_parsed(line) for line in lines]
        self._scratch.executemany("INSERT OR REPLACE INTO record VALUES (?, ?)", filter(None, good))
        forgotten = [(pair[0],) for pair in good if pair and pair[1] == "null"]
        self._scratch.executemany("DELETE FROM record WHERE name = ?", forgotten)
        if None in good:
            url, place = storage.join(self.folder, part), storage.join(self.damaged, part)
            numbers = [number for number, pair in enumerate(good, 1) if pair is None]
            logger.warning(
                "%s: lines %s are damaged; their records are made again. The damaged part is kept as %s",
                url,
                numbers,
                place,
            )
            storage.write_bytes(place, blob)
            whole = (line for line, pair in zip(lines, good, strict=True) if pair)
            storage.write_bytes(url, b"".join(whole))

    def _append(self, line: bytes) -> None:
        if storage.is_local(self.folder):
            if self._file is None:
                self._file = self._open()
            os.write(self._file, line)
            self._num_lines += 1
            if self._num_lines == PART_RECORDS:
                self.flush()
            return
        self._waiting.append(line)
        if len(self._waiting) >= PART_RECORDS or time.monotonic() - self._written >= PART_EVERY_S:
            self.flush()

    def _open(self) -> int:
        """Create a new local part and return its descriptor; never follow a link, which another user may plant."""
        folder = storage.local_path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(folder / self._next_name(), flags, 0o644)

    def _write_part(self, blob: bytes) -> None:
        storage.write_bytes(storage.join(self.folder, self._next_name()), blob)
        self._written = time.monotonic()

    def _next_name(self) -> str:
        name = f"{self._number:06d}{SUFFIX}"
        self._number += 1
        self._parts.append(name)
        return name


def _line(name: str, text: str) -> bytes:
    rest = f"{name} {text}".encode()
    return b"%08x %s\n" % (zlib.crc32(rest), rest)


def _parsed(line: bytes) -> tuple[str, str] | None:
    """Return (name, JSON) of a line, or None if it is damaged."""
    rest = line[9:-1]
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(rest):
        return None
    name, _, text = rest.decode().partition(" ")
    return name, text
