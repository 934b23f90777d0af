"""Read the parts of a ledger's records, on workers, and sort their lines by the first digits of the key in each name.

The driver gets compressed blocks, which it stores unread until workers need the records of a group or unit, and a hash
of each name.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ex4d import storage
from ex4d.threads import in_order
from pipelines.runtime.blocks import columns, unpack
from pipelines.runtime.stage import Row, Stage

NUM_READERS = 16  # threads that read parts; an object store serves many reads at once
FOLDERS = ("videos", "clips", "scores")  # of artifacts; their records are in one place if their keys begin alike
DELETED = "null"

Reader = Callable[[Iterable[Row], int], Iterator[Row]]  # (rows, their number) -> rows after READ, in any order


def read_parts(row: Row, _: Any) -> dict[str, Any]:
    """Read some parts and sort their lines by place; of the lines of one name, only the last one counts.

    Args:
        row: `parts`: URLs, in order. `digits`: see Records.

    Returns:
        `lines`, `lines_ends`: `NAME JSON` of each record by place, see `blocks.columns`; `names` and `deleted`: uint64
        hashes of the names of artifacts that have a record and of those whose record was deleted; `num_lines`;
        `damaged`: URLs of parts with damaged lines.
    """
    latest: dict[str, str] = {}
    damaged, num_lines = [], 0
    for url, blob in zip(row["parts"], in_order(storage.read_bytes, row["parts"], NUM_READERS), strict=True):
        lines = [parsed(line) for line in blob.splitlines(keepends=True)]
        latest.update(filter(None, lines))
        num_lines += len(lines)
        if None in lines:
            damaged.append(url)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, text in latest.items():
        groups[place_of(name, row["digits"])].append(f"{name} {text}")
    names, deleted = name_hashes(latest.items())
    facts = {"names": names, "deleted": deleted, "num_lines": num_lines, "damaged": damaged}
    return {**columns("lines", groups), **facts}


def merged(block: bytes) -> dict[str, str]:
    """Return {name: JSON} of the records in a block of lines `NAME JSON`; a later line replaces an earlier one."""
    latest = dict(line.split(" ", 1) for line in unpack(block))
    return {name: text for name, text in latest.items() if text != DELETED}


def parsed(line: bytes) -> tuple[str, str] | None:
    """Return (name, JSON) of a line, or None if it is damaged."""
    rest = line[9:-1]
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(rest):
        return None
    name, _, text = rest.decode().partition(" ")
    return name, text


def place_of(name: str, digits: int) -> str:
    """Return where the record of this name is: artifacts together whose keys begin alike, sources likewise."""
    kind, _, key = name.partition("/")
    if kind in FOLDERS:
        return f"artifacts/{key[:digits]}"
    return f"sources/{key[:digits]}" if kind == "sources" else "others/"


def name_hashes(records: Iterable[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return uint64 hashes of the names of artifacts that have a record, and of those whose record was deleted.

    Args:
        records: (name, JSON).
    """
    hashes = array("Q"), array("Q")
    for name, text in records:
        if name.startswith(FOLDERS):
            hashes[text == DELETED].append(int(name_hash(name)))
    return np.array(hashes[False], np.uint64), np.array(hashes[True], np.uint64)


def are_among(wanted: Any, hashes: np.ndarray) -> Any:
    """Return whether a uint64 hash, or each of an array, is in a sorted array of hashes."""
    if not len(hashes):
        return np.zeros(np.shape(wanted), bool)
    return hashes[np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)] == wanted


def name_hash(name: str) -> np.uint64:
    """Return 64 bits that stand for a name in `Records.may_have`."""
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


READ = Stage(
    "read_records",
    read_parts,
    reads=("parts", "digits"),
    writes=("lines", "lines_ends", "names", "deleted", "num_lines", "damaged"),
)
