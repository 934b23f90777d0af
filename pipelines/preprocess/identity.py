"""What is compared across all videos, and what follows: which are near duplicates, and which share a split.

A few numbers of each video suffice. Workers collect them unit by unit (`Collector`); the driver stores them in a table
of its scratch database (`Identity`) and decides when it has those of all videos. Meanwhile some 100 bytes of each video
are in memory, 64 of them the hashes of its frames.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.preprocess.duplicates import NUM_FRAMES

# `owner` is the video's own sha256; of the other camera's video of a pair, the sha256 of the video that has the pair.
FACTS = np.dtype([("sha256", "S32"), ("owner", "S32"), ("pixels", "<i8"), ("duration_s", "<f8")])
COLUMNS = ("facts", "hashes", "are_seen")


class Decision(NamedTuple):
    """What other videos decide about one: the sha256 of its group, which goes to one split, and of its stand-in.

    A stand-in is the near duplicate that replaces the video. None: the video itself.
    """

    sha256: str
    group: str | None
    stand_in: str | None


class Collector:
    """Collects the identity of some videos."""

    def __init__(self) -> None:
        self._facts: list[tuple[bytes, bytes, int, float]] = []
        self._hashes: list[Sequence[str]] = []

    def add(
        self,
        sha256: str,
        hashes: Sequence[str],
        size: Sequence[int],
        duration_s: float,
        other: tuple[str, list[str]] | None = None,
    ) -> None:
        """Add a video.

        Args:
            hashes: `duplicates.sampled`. size: [H, W].
            other: sha256 and hashes of the other camera's video, if the video has a pair.
        """
        owner = bytes.fromhex(sha256)
        self._facts.append((owner, owner, size[0] * size[1], duration_s))
        self._hashes.append(hashes)
        if other is not None:
            self._facts.append((bytes.fromhex(other[0]), owner, 0, 0.0))
            self._hashes.append(other[1])

    def columns(self) -> dict[str, np.ndarray]:
        """Return COLUMNS, uint8, for `Identity.extend`."""
        seen = [sum(1 << frame for frame, text in enumerate(hashes) if text) for hashes in self._hashes]
        values = [int(text or "0", 16) for hashes in self._hashes for text in hashes]
        arrays = (np.array(self._facts, FACTS), np.array(values, "<u8"), np.array(seen, np.uint8))
        return {name: np.frombuffer(array.tobytes(), np.uint8) for name, array in zip(COLUMNS, arrays, strict=True)}


class Identity:
    """The identity of all videos. Args: scratch: database for the table."""

    def __init__(self, scratch: sqlite3.Connection):
        self._scratch = scratch
        self._scratch.execute("CREATE TABLE identity (place TEXT, facts BLOB, hashes BLOB, are_seen BLOB)")
        self._scratch.execute("CREATE INDEX identity_place ON identity (place)")

    def extend(self, place: str, row: Mapping[str, Any]) -> None:
        """Add the videos in the columns of a `Collector`. Args: place: prefix of their contents."""
        blobs = [row[name].tobytes() for name in COLUMNS]
        self._scratch.execute("INSERT INTO identity VALUES (?, ?, ?, ?)", (place, *blobs))

    def decide(self, how: str) -> Iterator[Decision]:
        """Yield a decision for each video about which others decide, in the order of sha256.

        A pair of videos shares a group: a source in training must not be a target in validation.

        Args:
            how: value of preprocess.near_duplicates.
        """
        from pipelines.preprocess import near

        order, is_other, pairs = self._in_order()
        firsts = None if how == "off" else near.groups(*self._looks(), order)
        alone = np.arange(len(order), dtype=np.int32)
        firsts, best = alone if firsts is None else firsts, alone
        if how == "filter":
            videos = np.flatnonzero(~is_other)
            among = near.groups(*self._looks(), order[videos]) if is_other.any() else firsts
            best = alone.copy()
            best[videos] = videos[self._best(among, order[videos])]
        firsts = near.joined(firsts, pairs) if len(pairs) else firsts
        chosen = np.flatnonzero(~is_other & ((firsts != alone) | (best != alone)))
        firsts, best = firsts[chosen], best[chosen]
        named = np.unique(np.concatenate([chosen, firsts, best]))
        names = self._fact("sha256", order[named])
        for columns in zip(chosen, firsts, best, strict=True):
            places = np.searchsorted(named, columns)
            sha256, *others = (bytes(names[place]).ljust(32, b"\0").hex() for place in places)  # numpy strips zeros
            yield Decision(sha256, *(name if name != sha256 else None for name in others))

    def _in_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows of all videos, sorted by sha256, each once, int32 [M]; and, by position among these:

        whether a row is only another camera's, bool [M]; the pairs of a video and its other camera's, int [P,2].
        """
        names, is_other, owners = self._owned()
        order = np.arange(len(names), dtype=np.int32)
        if is_other.any() or not (names[1:] > names[:-1]).all():  # late videos and pairs are not in order
            order = np.lexsort((is_other, names)).astype(np.int32)
            is_new = np.append(True, names[order[1:]] != names[order[:-1]])[: len(order)]
            order = order[is_new]
        both = np.stack([names[is_other], owners], axis=1)
        return order, is_other[order], np.searchsorted(names[order], both)

    def _best(self, firsts: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return the best video of each group: the largest frame, then the longest duration, then the smallest hash."""
        members = np.flatnonzero(np.bincount(firsts, minlength=len(firsts))[firsts] > 1)
        pixels, durations_s = (self._fact(name, order[members]) for name in ("pixels", "duration_s"))
        groups = firsts[members]
        rank = np.lexsort((members, -durations_s, -pixels, groups))
        is_best = np.append(True, groups[rank[1:]] != groups[rank[:-1]])[: len(rank)]
        best = np.arange(len(firsts), dtype=np.int32)
        best[groups[rank[is_best]]] = members[rank[is_best]]
        return best[firsts]

    # ------------------------------------------------------------ the table

    def _blobs(self, column: str) -> Iterator[bytes]:
        return (blob for (blob,) in self._scratch.execute(f"SELECT {column} FROM identity ORDER BY place, rowid"))

    def _owned(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the sha256 of all rows, whether each is only another camera's, and the owners of these."""
        names, is_other, owners = bytearray(), bytearray(), bytearray()
        for blob in self._blobs("facts"):
            facts = np.frombuffer(blob, FACTS)
            others = facts["sha256"] != facts["owner"]
            names += facts["sha256"].tobytes()
            is_other += others.tobytes()
            owners += facts["owner"][others].tobytes()
        return np.frombuffer(names, "S32"), np.frombuffer(is_other, bool), np.frombuffer(owners, "S32")

    def _looks(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of all rows, uint64 [N,NUM_FRAMES], and uint8 [N], bit F is set unless frame F is flat."""
        (count,) = self._scratch.execute("SELECT COALESCE(SUM(LENGTH(are_seen)), 0) FROM identity").fetchone()
        found, start = (np.empty((count, NUM_FRAMES), np.uint64), np.empty(count, np.uint8)), 0
        for hashes, seen in zip(self._blobs("hashes"), self._blobs("are_seen"), strict=True):
            end = start + len(seen)
            found[0][start:end] = np.frombuffer(hashes, np.uint64).reshape(-1, NUM_FRAMES)
            found[1][start:end] = np.frombuffer(seen, np.uint8)
            start = end
        return found

    def _fact(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return one of FACTS of some rows, in their order."""
        wanted, places = np.unique(rows, return_inverse=True)
        found, start = np.empty(len(wanted), FACTS[name]), 0
        for blob in self._blobs("facts"):
            facts = np.frombuffer(blob, FACTS)[name]
            first, last = np.searchsorted(wanted, (start, start + len(facts)))
            found[first:last] = facts[wanted[first:last] - start]
            start += len(facts)
        return found[places]
