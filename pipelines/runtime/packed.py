"""Samples that are stored in the shards only: after `declare_only_copy` was called, the shards are their ledger.

The tables in `staging/packed` say where in which shard each sample lies. Before a shard is rebuilt, its samples are
copied back to staging, and all copies are made before any shard is overwritten, so no sample is lost if the run dies.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from ex4d import storage
from ex4d.data import building
from ex4d.errors import ContractError
from ex4d.threads import in_order
from pipelines.runtime.blocks import LAST
from pipelines.runtime.records import Records

FOLDER = "staging/packed"
MARK = "packed/alone"  # name of a record: samples may be missing from staging
NUM_THREADS = 32
COLUMNS = ("key", "shard", "offset", "length", "sha256")
NUM_TABLES = 4  # threads that read tables of shards


class Packed:
    """Locations of samples in the shards of a dataset folder.

    Args:
        scratch: a database with the ledger's table `file`.
        is_only_copy: `declare_only_copy` was called, in this run or an earlier one.
    """

    def __init__(self, output: str, scratch: sqlite3.Connection, is_only_copy: bool):
        self.output, self._scratch, self.is_only_copy = output, scratch, is_only_copy
        self._shards = list(_shards(output)) if is_only_copy else []  # (name, first key, last key)

    @property
    def holds_samples(self) -> bool:
        """True if some samples may be stored in shards only."""
        return bool(self._shards)

    def shards_of(self, prefix: str) -> list[str]:
        """Return the names of the shards that may hold samples whose key begins with `prefix`."""
        return [name for name, first, last in self._shards if first <= prefix + LAST and prefix <= last]

    @cached_property
    def _places(self) -> sqlite3.Connection:
        """The scratch database, with the table `packed` of all samples in shards."""
        self._scratch.execute("CREATE TABLE packed (key TEXT PRIMARY KEY, shard, offset, length, sha256) WITHOUT ROWID")
        names = [name for name, *_ in self._shards]
        for rows in in_order(partial(_rows, self.output, COLUMNS), names, NUM_TABLES):
            self._scratch.executemany("INSERT OR REPLACE INTO packed VALUES (?, ?, ?, ?, ?)", rows)
        return self._scratch

    def declare_only_copy(self, records: Records) -> None:
        """Declare that samples in shards need no file in staging."""
        if not self.is_only_copy:
            records.add(MARK, {})
            records.flush()  # before the first file is deleted
            self.is_only_copy = True

    def places(self, items: Iterable[Sequence[Any]]) -> list[list[Any]]:
        """Return [url, shard, offset, length, sha256] of those items that are stored in shards only.

        Args:
            items: [key, url, bytes, sha256] of each sample in a shard's plan.
        """
        found = []
        query = "SELECT shard, offset, length FROM packed WHERE key = ? AND sha256 = ?"
        for key, url, _, sha256 in items:
            place = self._places.execute(query, (key, sha256)).fetchone()
            if place is not None and not self._is_here(_name(url)):
                found.append([url, storage.join(self.output, place[0]), *place[1:], sha256])
        return found

    def dropped(self, items: Iterable[Sequence[Any]]) -> None:
        """Record that a worker deleted the staged files of these items of a shard's plan."""
        names = ((_name(url),) for _, url, *_ in items)
        self._scratch.executemany("DELETE FROM file WHERE name = ?", names)

    def drop(self, names: Iterable[str]) -> None:
        """Delete the staged files of samples that are already in shards."""
        if not self._scratch.execute("SELECT 1 FROM file WHERE name LIKE '%.tar' LIMIT 1").fetchone():
            return
        here = (name for name in names if self._is_here(name))
        for name in in_order(self._delete, here, NUM_THREADS):
            self._scratch.execute("DELETE FROM file WHERE name = ?", (name,))

    def _is_here(self, name: str) -> bool:
        return self._scratch.execute("SELECT 1 FROM file WHERE name = ?", (name,)).fetchone() is not None

    def _delete(self, name: str) -> str:
        storage.remove(storage.join(self.output, "staging", name))
        return name


def sizes_in(output: str, shards: Iterable[str], bodies: Mapping[str, str]) -> dict[str, int]:
    """Return {name: bytes} of the samples with a record in `bodies` that are in these shards as they were made."""
    found: dict[str, Any] = {}
    for rows in in_order(partial(_rows, output, ("key", "length", "sha256")), shards, NUM_TABLES):
        found |= {key: facts for key, *facts in rows}
    sizes = {}
    for name, body in bodies.items() if found else ():
        length, sha256 = found.get(name.removeprefix("clips/").rsplit(".", 2)[0], (0, ""))
        if name.endswith(".tar") and sha256 and json.loads(body)["sha256"] == sha256:
            sizes[name] = length
    return sizes


def _name(url: str) -> str:
    return f"clips/{url.rpartition('/')[2]}"


def _shards(output: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, first key, last key) of each shard that is unchanged since it was built."""
    folder = storage.join(output, FOLDER)
    names = [f"shards/{name.removesuffix('.parquet')}.tar" for name in storage.list_files(folder, (".parquet",))]

    def read(name: str) -> tuple[str, str, str] | None:
        facts = building.read_facts(folder, name)
        if not facts or not building.is_as_built(facts, output, folder):
            return None
        return name, *building.first_and_last_key(folder, name)

    return filter(None, in_order(read, names, NUM_TABLES))


def _rows(output: str, columns: Sequence[str], name: str) -> list[tuple[Any, ...]]:
    table = building.read_rows(storage.join(output, FOLDER), name, columns)
    return list(zip(*(table[column].to_pylist() for column in columns), strict=True))


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
