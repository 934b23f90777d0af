"""Blocks of text lines. Workers read and write their lines; the driver only stores blocks and passes them on.

A block is a gzip file. Joined blocks are a block again, which holds the lines of all.
"""

from __future__ import annotations

import gzip
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

LAST = "\x7f"  # sorts after all characters of names
STORED, COMPRESSED = 0, 1  # levels: a block that is soon read on this machine is not worth compressing


def pack(lines: Iterable[str], level: int = COMPRESSED) -> bytes:
    """Return the block of these lines, none of which contains a line break."""
    text = "".join(f"{line}\n" for line in lines)
    return gzip.compress(text.encode(), level, mtime=0) if text else b""


def unpack(block: bytes) -> list[str]:
    """Return the lines of a block."""
    return gzip.decompress(block).decode().split("\n")[:-1] if block else []


def columns(name: str, groups: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Return the columns of a row that hold {place: lines}: `name`, the joined blocks, and `name`_ends."""
    packed = {place: pack(lines) for place, lines in groups.items()}
    ends = np.cumsum([len(block) for block in packed.values()]).tolist()
    joined = np.frombuffer(b"".join(packed.values()), np.uint8)
    return {name: joined, f"{name}_ends": dict(zip(packed, ends, strict=True))}


class Blocks:
    """Blocks in a table of a scratch database, each at a place: a prefix of the names that its lines are about."""

    def __init__(self, scratch: sqlite3.Connection, table: str):
        self._scratch, self._table = scratch, table
        self._scratch.execute(f"CREATE TABLE {table} (place TEXT, number INTEGER, block BLOB)")
        self._scratch.execute(f"CREATE INDEX {table}_place ON {table} (place, number)")

    def add(self, place: str, block: bytes, number: int = 0) -> None:
        """Add a block. Blocks of one place are read in the order of their numbers."""
        self._scratch.execute(f"INSERT INTO {self._table} VALUES (?, ?, ?)", (place, number, block))

    def add_row(self, name: str, row: Mapping[str, Any], number: int = 0) -> None:
        """Add the blocks in the columns of a row, as made by `columns`."""
        joined, start = row[name].tobytes(), 0
        for place, end in row[f"{name}_ends"].items():
            self.add(place, joined[start:end], number)
            start = end

    def of(self, prefix: str) -> bytes:
        """Return the blocks of all places that begin with `prefix`, joined."""
        query = f"SELECT block FROM {self._table} WHERE place BETWEEN ? AND ? ORDER BY place, number, rowid"
        return b"".join(block for (block,) in self._scratch.execute(query, (prefix, prefix + LAST)))

    def at(self, place: str) -> bytes:
        """Return the blocks of one place, joined."""
        query = f"SELECT block FROM {self._table} WHERE place = ? ORDER BY number, rowid"
        return b"".join(block for (block,) in self._scratch.execute(query, (place,)))

    def drop(self) -> None:
        """Delete the table."""
        self._scratch.execute(f"DROP TABLE {self._table}")

    def places(self) -> list[str]:
        """Return all places, sorted."""
        return [place for (place,) in self._scratch.execute(f"SELECT DISTINCT place FROM {self._table} ORDER BY place")]

    def lines(self) -> Iterator[str]:
        """Yield all lines, in the order of their places."""
        for (block,) in self._scratch.execute(f"SELECT block FROM {self._table} ORDER BY place, number, rowid"):
            yield from unpack(block)


class Sorter:
    """Collects lines by place, in blocks that are written to a `Blocks` when they are large enough."""

    MAX_LINES = 500  # of a block
    MAX_WAITING = 50_000  # of all places, so that memory is bounded

    def __init__(self, blocks: Blocks, number: int = 0):
        self._blocks, self._number = blocks, number
        self._waiting: dict[str, list[str]] = {}
        self._num_waiting = 0

    def add(self, place: str, line: str) -> None:
        """Add a line."""
        waiting = self._waiting.setdefault(place, [])
        waiting.append(line)
        if len(waiting) >= self.MAX_LINES:
            self._blocks.add(place, pack(waiting, STORED), self._number)
            waiting.clear()
        self._num_waiting += 1
        if self._num_waiting >= self.MAX_WAITING:
            self.close()

    def close(self) -> None:
        """Write the lines that wait."""
        for place, waiting in self._waiting.items():
            if waiting:
                self._blocks.add(place, pack(waiting, STORED), self._number)
        self._waiting, self._num_waiting = {}, 0
