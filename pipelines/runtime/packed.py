"""Samples that are stored in the shards only: after `alone` was called, the shards are their ledger.

The tables in `staging/packed` say where in which shard each sample lies. Before a shard is rebuilt, its samples are
copied back to staging, and all copies are made before any shard is overwritten, so no sample is lost if the run dies.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ex4d import storage
from ex4d.data import building
from ex4d.errors import ContractError
from ex4d.threads import in_order
from pipelines.runtime.records import Records

FOLDER = "staging/packed"
MARK = "packed/alone"  # name of a record: samples may be missing from staging
NUM_THREADS = 32
COLUMNS = ("key", "shard", "offset", "length", "sha256")


class Packed:
    """Locations of samples in the shards of a dataset folder.

    Args:
        scratch: a database with the ledger's tables `file` and `record`.
    """

    def __init__(self, output: str, scratch: sqlite3.Connection):
        self.output, self._scratch = output, scratch
        self._scratch.execute("CREATE TABLE packed (key TEXT PRIMARY KEY, shard, offset, length, sha256) WITHOUT ROWID")
        self.is_alone = scratch.execute("SELECT 1 FROM record WHERE name = ?", (MARK,)).fetchone() is not None
        if self.is_alone:
            for rows in _rows(output):
                self._scratch.executemany("INSERT OR REPLACE INTO packed VALUES (?, ?, ?, ?, ?)", rows)
            self._scratch.execute(
                "INSERT OR IGNORE INTO file SELECT name, length, 0 FROM packed JOIN record ON name BETWEEN "
                "'clips/' || key || '.' AND 'clips/' || key || '.~' WHERE name LIKE '%.tar' AND "
                "json_extract(body, '$.sha256') = sha256"
            )

    @property
    def holds_samples(self) -> bool:
        """True if some samples may be stored in shards only."""
        return self._scratch.execute("SELECT 1 FROM packed LIMIT 1").fetchone() is not None

    def alone(self, records: Records) -> None:
        """Declare that samples in shards need no file in staging."""
        if not self.is_alone:
            records.add(MARK, {})
            records.flush()  # before the first file is deleted
            self.is_alone = True

    def places(self, items: Iterable[Sequence[Any]]) -> list[list[Any]]:
        """Return [url, shard, offset, length, sha256] of those items that are stored in shards only.

        Args:
            items: [key, url, bytes, sha256] of each sample in a shard's plan.
        """
        found = []
        for key, url, _, sha256 in items:
            name = f"clips/{url.rpartition('/')[2]}"
            query = "SELECT shard, offset, length FROM packed JOIN file ON name = ? WHERE key = ? AND NOT is_here"
            place = self._scratch.execute(query, (name, key)).fetchone()
            if place is not None:
                found.append([url, storage.join(self.output, place[0]), *place[1:], sha256])
        return found

    def dropped(self, items: Iterable[Sequence[Any]]) -> None:
        """Record that a worker deleted the staged files of these items of a shard's plan."""
        names = ((f"clips/{url.rpartition('/')[2]}",) for _, url, *_ in items)
        self._scratch.executemany("UPDATE file SET is_here = 0 WHERE name = ?", names)

    def drop(self, names: Iterable[str]) -> None:
        """Delete the staged files of samples that are already in shards."""
        if not self._scratch.execute("SELECT 1 FROM file WHERE is_here AND name LIKE '%.tar' LIMIT 1").fetchone():
            return
        here = (name for name in names if self._is_here(name))
        for name in in_order(self._delete, here, NUM_THREADS):
            self._scratch.execute("UPDATE file SET is_here = 0 WHERE name = ?", (name,))

    def _is_here(self, name: str) -> bool:
        return bool(self._scratch.execute("SELECT is_here FROM file WHERE name = ?", (name,)).fetchone()[0])

    def _delete(self, name: str) -> str:
        storage.remove(storage.join(self.output, "staging", name))
        return name


def _rows(output: str) -> Iterator[Iterable[tuple[Any, ...]]]:
    """Yield the rows of each shard that is unchanged since it was built."""
    folder = storage.join(output, FOLDER)
    names = [f"shards/{name.removesuffix('.parquet')}.tar" for name in storage.list_files(folder, (".parquet",))]

    def read(name: str) -> list[tuple[Any, ...]]:
        facts = building.read_facts(folder, name)
        if not facts or not building.is_as_built(facts, output, folder):
            return []
        table = building.read_rows(folder, name)
        return list(zip(*(table[column].to_pylist() for column in COLUMNS), strict=True))

    yield from in_order(read, names, 4)


def restore(places: Iterable[Sequence[Any]]) -> None:
    """Copy samples back to staging, given the result of `Packed.places`. Raises ContractError if one is damaged."""

    def copy(place: Sequence[Any]) -> None:
        url, shard, offset, length, sha256 = place
        blob = storage.read_bytes(shard, offset, length)
        if hashlib.sha256(blob).hexdigest() != sha256:
            raise ContractError(
                f"{shard}: the sample at {offset} is not what was packed; delete the shard and run again"
            )
        storage.write_bytes(url, blob)

    for _ in in_order(copy, places, NUM_THREADS):
        pass


def delete(items: Iterable[Sequence[Any]]) -> None:
    """Delete the staged files of the items of a shard's plan."""
    for _ in in_order(storage.remove, (url for _, url, *_ in items), NUM_THREADS):
        pass
