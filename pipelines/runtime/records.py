"""Records of a ledger, many per file: `staging/records/NUMBER.records`, written by the driver alone.

A line is `CRC NAME JSON`; CRC is the CRC-32 of the rest, as 8 hex digits. A later line replaces an earlier one of the
same name, and `null` deletes the record. On a local disk, a run appends each line to a part as it is written, so that
records survive the process. An object store cannot append, so there a part is written every few seconds.

Workers read the parts of earlier runs (`parts.py`). The driver stores their blocks unread, with a 64-bit hash of each
name, and passes them to the workers that compare and plan units.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np

from ex4d import storage
from pipelines.runtime.blocks import STORED, Blocks, Sorter, pack
from pipelines.runtime.parts import (
    DELETED,
    FOLDERS,
    Reader,
    are_among,
    merged,
    name_hash,
    name_hashes,
    parsed,
    place_of,
    read_parts,
)
from pipelines.runtime.stage import new_row

logger = logging.getLogger(__name__)

SUFFIX = ".records"
PART_EVERY_S = 10.0  # interval between two parts in an object store
PART_RECORDS = 5000  # maximum records of a part: parts are read whole
PARTS_AT_ONCE = 16  # parts that one call of `read_parts` reads


class Records:
    """The records of one ledger: {name: mapping}.

    They are kept in a scratch database on this machine, not in memory: a million videos have gigabytes of records.
    Those of earlier runs are in blocks; only records that this run writes have rows of their own.

    Args:
        scratch: the database.
        folder: where the parts are, local or in an object store.
        damaged: folder for copies of damaged parts.
        parts: names of the parts of earlier runs, in order.
        digits: number of first characters of a key that its place has.
        read: runs READ; None: in this process.
    """

    def __init__(
        self,
        scratch: sqlite3.Connection,
        folder: str,
        damaged: str,
        parts: Sequence[str],
        digits: int = 0,
        read: Reader | None = None,
    ):
        self.folder, self.damaged, self.digits, self._scratch = folder, damaged, digits, scratch
        self._scratch.execute("CREATE TABLE record (name TEXT PRIMARY KEY, body TEXT)")
        self._earlier = Blocks(scratch, "earlier")
        # Sorted hashes of the names of artifacts in `_earlier`, some twice; None after `drop_hashes`.
        self._names: np.ndarray | None = np.zeros(0, np.uint64)
        self._last: tuple[str, dict[str, str]] = ("", {})
        self._waiting: list[bytes] = []
        self._file: int | None = None
        self._num_lines = 0
        self._written = time.monotonic()
        self._parts = list(parts)
        self._number = 1 + max((int(name[: -len(SUFFIX)]) for name in self._parts), default=0)
        self.num_earlier = self._read(read) if self._parts else 0

    def __contains__(self, name: str) -> bool:
        return self._text(name) is not None

    def __iter__(self) -> Iterator[str]:
        """Yield the names, sorted."""
        self._settle()
        return iter(sorted(name for place in self._earlier.places() for name in self._bucket(place)))

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a record, or None if there is none. The first look-up in a place decompresses the whole place."""
        text = self._text(name)
        return None if text is None else json.loads(text)

    def may_have(self, name: str) -> bool:
        """Return whether there is a record of an artifact, fast; wrong for one name in 10^12 (of 10^7 records)."""
        if self._names is None:
            return name in self
        found = self._own(name)
        return bool(are_among(name_hash(name), self._names)) if found is None else found != DELETED

    def may_have_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """Return, for each `name_hash` of an array, whether an earlier run wrote its record. Before `drop_hashes`."""
        assert self._names is not None
        found: np.ndarray = are_among(hashes, self._names)
        return found

    def drop_hashes(self) -> None:
        """Free the hashes of names. From here on, `may_have` is right but slow."""
        self._names = None

    def add(self, name: str, body: Mapping[str, Any]) -> None:
        """Write a record; in an object store possibly some seconds later, see `flush`."""
        self._add(name, json.dumps(body, sort_keys=True))

    def forget(self, name: str) -> None:
        """Delete a record."""
        self._add(name, DELETED)

    def flush(self) -> None:
        """Write all pending records, and finish the current part."""
        if self._waiting:
            self._write_part(b"".join(self._waiting))
            self._waiting = []
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file, self._num_lines = None, 0

    def unit(self, prefix: str) -> bytes:
        """Return the records of all artifacts whose key begins with `prefix` as a block, see `merged`."""
        own: list[str] = []
        for folder in FOLDERS:
            bounds = (f"{folder}/{prefix}", f"{folder}/{prefix}\x7f")
            rows = self._scratch.execute("SELECT name || ' ' || body FROM record WHERE name BETWEEN ? AND ?", bounds)
            own += [line for (line,) in rows]
        return self._earlier.of(place_of(f"clips/{prefix}", self.digits)) + pack(own, STORED)

    @property
    def has_sources(self) -> bool:
        """True if earlier runs recorded sources."""
        return any(place.startswith("sources/") for place in self._earlier.places())

    def sources(self, prefix: str) -> bytes:
        """Return what earlier runs recorded of sources whose name begins with `sources/PREFIX`, as a block."""
        return self._earlier.of(f"sources/{prefix}")

    def rewrite(self) -> None:
        """Write all records as new parts of PART_RECORDS, and delete the old parts."""
        self.flush()
        self._settle()
        old, lines = list(self._parts), list[bytes]()
        for place in self._earlier.places():
            lines += [_line(name, text) for name, text in sorted(self._bucket(place).items())]
            while len(lines) >= PART_RECORDS:
                self._write_part(b"".join(lines[:PART_RECORDS]))
                lines = lines[PART_RECORDS:]
        if lines:
            self._write_part(b"".join(lines))
        for name in old:  # oldest first: after an interruption, deleted records must not come back
            storage.remove(storage.join(self.folder, name))
        self._parts = [name for name in self._parts if name not in old]

    # ------------------------------------------------------------ parts of earlier runs

    def _read(self, read: Reader | None) -> int:
        """Read all parts; return the number of their lines."""
        urls = [storage.join(self.folder, name) for name in self._parts]
        groups = [urls[first : first + PARTS_AT_ONCE] for first in range(0, len(urls), PARTS_AT_ONCE)]
        rows = (
            new_row(f"records {number}", parts=parts, digits=self.digits, number=number)
            for number, parts in enumerate(groups)
        )
        here = (row | read_parts(row, None) for row in rows)
        found = here if read is None or len(groups) == 1 else read(rows, len(groups))
        num_lines, hashes, damaged = 0, dict[int, tuple[np.ndarray, np.ndarray]](), list[str]()
        for row in found:
            self._earlier.add_row("lines", row, row["number"])
            hashes[row["number"]] = (row["names"], row["deleted"])
            num_lines += row["num_lines"]
            damaged += row["damaged"]
        self._note([part for number in range(len(groups)) for part in hashes[number]])
        for url in damaged:
            self._mend(url)
        return num_lines

    def _note(self, changes: Sequence[np.ndarray]) -> None:
        """Update the hashes of names. Args: changes: in turn, in order, hashes of names written and deleted."""
        names = np.concatenate([self._names, *changes[::2]])
        names.sort()
        deleted = np.unique(np.concatenate([np.zeros(0, np.uint64), *changes[1::2]]))
        is_gone = np.zeros(len(deleted), bool)
        for written, gone in zip(changes[::2], changes[1::2], strict=True):  # the last change counts
            is_gone[np.searchsorted(deleted, written[are_among(written, deleted)])] = False
            is_gone[np.searchsorted(deleted, gone)] = True
        self._names = names[~are_among(names, deleted[is_gone])] if is_gone.any() else names

    def _mend(self, url: str) -> None:
        """Copy a damaged part aside, and remove its damaged lines."""
        blob = storage.read_bytes(url)
        lines = blob.splitlines(keepends=True)
        good = [parsed(line) is not None for line in lines]
        numbers = [number for number, is_good in enumerate(good, 1) if not is_good]
        place = storage.join(self.damaged, url.rpartition("/")[2])
        logger.warning(
            "%s: lines %s are damaged; their records are made again. The damaged part is kept as %s",
            url,
            numbers,
            place,
        )
        storage.write_bytes(place, blob)
        storage.write_bytes(url, b"".join(compress(lines, good)))

    def _own(self, name: str) -> str | None:
        """Return the JSON of a record that this run has written; None if it has written none."""
        found = self._scratch.execute("SELECT body FROM record WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def _text(self, name: str) -> str | None:
        own = self._own(name)
        if own is not None:
            return None if own == DELETED else own
        return self._bucket(place_of(name, self.digits)).get(name)

    def _bucket(self, place: str) -> dict[str, str]:
        """Return the records of a place that earlier runs have written."""
        if self._last[0] != place:
            self._last = (place, merged(self._earlier.at(place)))
        return self._last[1]

    def _settle(self) -> None:
        """Move the records that this run has written to the blocks."""
        sorter = Sorter(self._earlier, self._number)  # grows with every part
        for name, body in self._scratch.execute("SELECT name, body FROM record"):
            sorter.add(place_of(name, self.digits), f"{name} {body}")
        sorter.close()
        if self._names is not None:
            self._note(name_hashes(self._scratch.execute("SELECT name, body FROM record")))
        self._scratch.execute("DELETE FROM record")
        self._last = ("", {})

    # ------------------------------------------------------------ parts of this run

    def _add(self, name: str, text: str) -> None:
        self._scratch.execute("INSERT OR REPLACE INTO record VALUES (?, ?)", (name, text))
        self._append(_line(name, text))

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
