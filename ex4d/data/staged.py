"""Describe staged samples, assign their sources to splits, and plan which sample goes into which shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol

from ex4d import storage
from ex4d.data import building, manifest
from ex4d.data.tar import END


class Staged(NamedTuple):
    """A finished sample that waits to be packed.

    Args:
        key: the sample's key.
        split: "train" or "val".
        url: a file with exactly the bytes of `sample_tar`.
        size, sha256: of that file; checked if known.
    """

    key: str
    split: str
    url: str
    size: int | None = None
    sha256: str = ""


def split_of(source_group: str, val_fraction: float) -> str:
    """Return "train" or "val" for all clips of a source group: one source, or near-duplicate sources.

    Args:
        source_group: see sample.PROVENANCE.
        val_fraction: expected share of groups in "val", in [0, 1].
    """
    draw = int.from_bytes(hashlib.sha256(f"split:{source_group}".encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_fraction else "train"


def with_sizes(staged: Iterable[Staged]) -> list[Staged]:
    """Return the samples with unknown sizes looked up; -1 for a missing file."""
    items = list(staged)
    unknown = [index for index, item in enumerate(items) if item.size is None]

    def size(index: int) -> int:
        try:
            return storage.size(items[index].url)
        except FileNotFoundError:
            return -1

    with ThreadPoolExecutor(4 * building.NUM_READERS) as pool:
        for index, num_bytes in zip(unknown, pool.map(size, unknown), strict=True):
            items[index] = items[index]._replace(size=num_bytes)
    return items


class Contents(Protocol):
    """The input of a pack, which can be iterated repeatedly, so that a million samples need not be held in memory."""

    def staged(self) -> Iterator[Staged]:
        """Yield every sample in the order of split and key, with its size; -1 for a missing file."""

    def rejects(self) -> Iterator[Mapping[str, str]]:
        """Yield mappings of manifest.REJECT_COLUMNS, sorted by these columns."""


class Listed:
    """Contents from lists in memory, in any order."""

    def __init__(self, staged: Iterable[Staged], rejects: Iterable[Mapping[str, str]]):
        self._staged = sorted(with_sizes(staged), key=lambda item: (item.split, item.key))
        self._rejects = sorted(rejects, key=lambda row: [row.get(name) or "" for name in manifest.REJECT_COLUMNS])

    def staged(self) -> Iterator[Staged]:
        """Yield the samples."""
        return iter(self._staged)

    def rejects(self) -> Iterator[Mapping[str, str]]:
        """Yield the rejects."""
        return iter(self._rejects)


def plans(items: Iterable[Staged], shard_size_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the plan of each shard for `building.build`; its `digest` covers everything that determines the bytes."""
    for split, members in groupby(items, key=lambda item: item.split):
        number = size = 0
        group: list[Staged] = []
        for item in chain(members, [None]):
            if group and (item is None or size + (item.size or 0) + len(END) > shard_size_bytes):
                yield _plan(manifest.shard_name(split, number), split, group)
                number, size, group = number + 1, 0, []
            if item is not None:
                size += item.size or 0
                group.append(item)


def _plan(name: str, split: str, group: Sequence[Staged]) -> dict[str, Any]:
    known = [item.sha256 or _known_as(item) for item in group]
    whole = digest(manifest.FORMAT_VERSION, name, [[item.key, mark] for item, mark in zip(group, known, strict=True)])
    items = [[item.key, item.url, item.size, item.sha256] for item in group]
    return {"name": name, "split": split, "items": items, "digest": whole if all(known) else ""}


def _known_as(item: Staged) -> str:
    """Return what identifies a staged file without reading it; "" if nothing does.

    For a local file that is its name with size, time and inode; in a store, a fingerprint in the name.
    """
    name = item.url.rpartition("/")[2]
    if storage.is_local(item.url):
        return f"{name} {building.stamp(item.url)}"
    return name if "." in name.removeprefix(f"{item.key}.") else ""


def digest(*parts: Any) -> str:
    """Return the sha256 of JSON-serialisable parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_of(rows: Iterable[Mapping[str, str]]) -> str:
    """Return the sha256 of rows in their order."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return whole.hexdigest()
