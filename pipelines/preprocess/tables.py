"""What a run knows of its videos and clips, in a scratch database, since a million videos take gigabytes."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from heapq import merge
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from pipelines.preprocess.identity import Decision
from pipelines.runtime.blocks import STORED, Blocks, pack, unpack
from pipelines.runtime.parts import FOLDERS, are_among, name_hash
from pipelines.runtime.stage import Row

UNIT_VIDEOS = 4000  # videos of a unit on average, at most; content hashes are evenly distributed
VIDEO_BYTES = 2500  # of the records of a video with two clips, with which the number of known videos is estimated
HEX = "0123456789abcdef"
_TABLES = (
    "video (content TEXT, name TEXT, body TEXT, PRIMARY KEY (content, name))",
    "changed (name TEXT, line TEXT)",
    "dropped (content TEXT PRIMARY KEY) WITHOUT ROWID",
    "pair (content TEXT PRIMARY KEY, sha256 TEXT)",
    "staged (split TEXT, key TEXT, artifact TEXT, size INTEGER, sha256 BLOB, PRIMARY KEY (split, key))",
    "decided (sha256 TEXT PRIMARY KEY, source_group TEXT, stand_in TEXT) WITHOUT ROWID",
    "stand_in (sha256 TEXT PRIMARY KEY, name TEXT) WITHOUT ROWID",
    "work (number INTEGER PRIMARY KEY, rows BLOB)",
    "scored (key TEXT PRIMARY KEY, body TEXT) WITHOUT ROWID",
    "superseded (name TEXT PRIMARY KEY) WITHOUT ROWID",
    "tried (artifact TEXT, name TEXT, refusal TEXT, PRIMARY KEY (artifact, name))",
)


def digits_for(num_videos: int, ledger_bytes: int = 0) -> int:
    """Return how many hex digits of a content hash divide this many videos, or those of the ledger, into units."""
    digits = 0
    while max(num_videos, ledger_bytes // VIDEO_BYTES) > UNIT_VIDEOS * 16**digits:
        digits += 1
    return digits


def pack_rows(rows: Sequence[Row]) -> bytes:
    """Serialize rows to compressed bytes."""
    return zlib.compress(json.dumps(rows).encode(), 1)


def unpack_rows(packed: bytes) -> list[Row]:
    """Deserialize the result of `pack_rows`."""
    rows: list[Row] = json.loads(zlib.decompress(packed))
    return rows


class Clip(NamedTuple):
    """A finished sample: its split, key, artifact in the ledger, and the artifact's bytes and sha256."""

    split: str
    key: str
    artifact: str
    size: int
    sha256: str


class Tables:
    """The videos, clips and pending rows of one run.

    Videos are in units: those whose content begins with the same `digits` hex digits. Unchanged videos are in blocks,
    others are rows; so are finished samples.

    Args:
        database: the ledger's.
        digits: from `digits_for`.
    """

    def __init__(self, database: sqlite3.Connection, digits: int):
        self._scratch = database
        for table in _TABLES:
            self._scratch.execute(f"CREATE TABLE {table}")
        self.digits = digits
        self.unchanged, self._finished, self._names = (
            Blocks(database, name) for name in ("unchanged", "finished", "names")
        )
        self._num_in_blocks = 0
        self._hashes = [np.zeros(0, np.uint64)]

    # ------------------------------------------------------------ videos

    def add_unchanged(self, row: Mapping[str, Any]) -> None:
        """Add the videos in the columns `videos` of a row of `unchanged.UNCHANGED`; all before the first hashed one."""
        self.unchanged.add_row("videos", row)
        self._hashes.append(row["contents"])

    def add_changed(self, lines: Iterable[str]) -> None:
        """Add sources to be hashed: lines of `unchanged.check_group`."""
        self._scratch.executemany("INSERT INTO changed VALUES (?, ?)", ((json.loads(line)[0], line) for line in lines))

    def changed(self) -> Iterator[list[Any]]:
        """Yield [name, line, record] of each source to be hashed, sorted by name."""
        return (json.loads(line) for (line,) in self._scratch.execute("SELECT line FROM changed ORDER BY name"))

    def add_video(self, row: Row) -> bool:
        """Add a hashed video; return True if it is the first with its `content`."""
        known = self._scratch.execute("SELECT 1 FROM video WHERE content = ?", (row["content"],)).fetchone()
        values = (row["content"], row["name"], json.dumps(row))
        self._scratch.execute("INSERT INTO video VALUES (?, ?, ?)", values)
        return known is None and not are_among(name_hash(row["content"]), self._contents)

    @cached_property
    def _contents(self) -> np.ndarray:
        """Sorted hashes of the contents of unchanged videos."""
        found = np.concatenate(self._hashes)
        self._hashes.clear()
        found.sort()
        return found

    def drop_hashes(self) -> None:
        """Free what only `add_video` needs, which is not called any more."""
        self._hashes.clear()
        vars(self).pop("_contents", None)

    def unit(self, prefix: str) -> dict[str, Any]:
        """Return columns for `videos_of`: all videos whose content begins with `prefix`, except for dropped ones."""
        bounds = (prefix, f"{prefix}g")
        rows = self._scratch.execute("SELECT body FROM video WHERE content BETWEEN ? AND ?", bounds)
        block = self.unchanged.of(prefix) + pack((body for (body,) in rows), STORED)
        dropped = self._scratch.execute("SELECT content FROM dropped WHERE content BETWEEN ? AND ?", bounds)
        return {"videos": np.frombuffer(block, np.uint8), "dropped": [content for (content,) in dropped]}

    def drop_video(self, content: str) -> None:
        """Drop a video that is rejected and has no record."""
        self._scratch.execute("INSERT OR IGNORE INTO dropped VALUES (?)", (content,))

    def add_names(self, row: Mapping[str, Any]) -> None:
        """Add the names in the columns `names` of a row, see `compare.names_of`."""
        self._names.add_row("names", row)

    def add_pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Add (content, sha256) of videos whose content is not their sha256."""
        self._scratch.executemany("INSERT INTO pair VALUES (?, ?)", pairs)

    def decide(self, decisions: Iterable[Decision]) -> None:
        """Store decisions across videos, and the first name of each stand-in."""
        execute, executemany = self._scratch.execute, self._scratch.executemany
        executemany("INSERT INTO decided VALUES (?, ?, ?)", decisions)
        execute("INSERT INTO stand_in SELECT DISTINCT stand_in, NULL FROM decided WHERE stand_in IS NOT NULL")
        places = execute("SELECT DISTINCT SUBSTR(sha256, 1, 2) FROM stand_in").fetchall()
        for (prefix,) in places:
            found: dict[str, str] = {}
            for line in unpack(self._names.at(prefix)):
                sha256, name = json.loads(line)
                found[sha256] = min(name, found.get(sha256, name))
            executemany("UPDATE stand_in SET name = ? WHERE sha256 = ?", ((name, key) for key, name in found.items()))

    def decided(self, prefix: str) -> dict[str, list[str | None]]:
        """Return {sha256: [its group, name of the video that replaces it]} of a unit's videos; None: their own."""
        decided = "SELECT decided.sha256, source_group, name FROM {} LEFT JOIN stand_in ON stand_in = stand_in.sha256"
        query = (
            f"{decided.format('decided')} WHERE decided.sha256 BETWEEN :first AND :last UNION ALL "
            f"{decided.format('pair JOIN decided USING (sha256)')} WHERE content BETWEEN :first AND :last"
        )
        rows = self._scratch.execute(query, {"first": prefix, "last": f"{prefix}g"})
        return {sha256: [group, name] for sha256, group, name in rows}

    def units(self) -> list[str]:
        """Return the prefixes of content hashes that divide the videos into units."""
        return ["".join(letters) for letters in product(HEX, repeat=self.digits)]

    # ------------------------------------------------------------ clips

    def add_work(self, packed: bytes) -> None:
        """Add rows for the next pass, packed by `pack_rows`."""
        self._scratch.execute("INSERT INTO work (rows) VALUES (?)", (packed,))

    def work(self) -> Iterator[Row]:
        """Yield the rows of the next pass."""
        for (packed,) in self._scratch.execute("SELECT rows FROM work ORDER BY number"):
            yield from unpack_rows(packed)

    def clear_work(self) -> None:
        """Delete the rows of the last pass."""
        self._scratch.execute("DELETE FROM work")

    def add_staged(self, clips: Iterable[Sequence[Any]]) -> None:
        """Add finished samples, in the form of `Clip`."""
        rows = ((split, key, artifact, size, bytes.fromhex(digest)) for split, key, artifact, size, digest in clips)
        self._scratch.executemany("INSERT INTO staged VALUES (?, ?, ?, ?, ?)", rows)

    def add_staged_of(self, row: Mapping[str, Any]) -> None:
        """Add the finished samples in the columns `staged` of a unit's row: `Clip` as JSON, by split and unit."""
        self._finished.add_row("staged", row)
        self._num_in_blocks += row["planned"]["num_staged"]

    def staged(self) -> Iterator[Clip]:
        """Yield the finished samples in packing order."""
        rows = self._scratch.execute("SELECT * FROM staged ORDER BY split, key")
        own = (Clip(split, key, artifact, size, digest.hex()) for split, key, artifact, size, digest in rows)
        return merge(own, (Clip(*json.loads(line)) for line in self._finished.lines()))

    def num_staged(self) -> int:
        """Return the number of finished samples."""
        return self._num_in_blocks + self.count("staged")

    def artifacts(self, keys: Iterable[str]) -> list[str]:
        """Return the artifacts of some finished samples."""
        wanted = set(keys)
        return [clip.artifact for clip in self.staged() if clip.key in wanted]

    def add_scored(self, row: Mapping[str, Any]) -> None:
        """Add the scores of a clip in a `score_only` run: key, name, start_frame, end_frame, scores."""
        self._scratch.execute("INSERT INTO scored VALUES (?, ?)", (row["key"], json.dumps(row)))

    def scored(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of `add_scored`, sorted by key."""
        return (json.loads(body) for (body,) in self._scratch.execute("SELECT body FROM scored ORDER BY key"))

    def add_superseded(self, names: Iterable[str]) -> None:
        """Add artifacts that are unused while others of the same video are used."""
        self._scratch.executemany("INSERT INTO superseded VALUES (?)", ((name,) for name in names))

    def superseded(self) -> Iterator[str]:
        """Yield the names of `add_superseded`, sorted."""
        return (name for (name,) in self._scratch.execute("SELECT name FROM superseded ORDER BY name"))

    def add_tried(self, artifact: str, name: str, refusal: Mapping[str, Any]) -> None:
        """Store why a row failed, so that this run does not retry it; a copy under another name may still succeed."""
        self._scratch.execute("INSERT INTO tried VALUES (?, ?, ?)", (artifact, name, json.dumps(refusal)))

    def tried(self, artifact: str, name: str) -> dict[str, Any] | None:
        """Return the refusal that `add_tried` stored, or None."""
        query = "SELECT refusal FROM tried WHERE artifact = ? AND name = ?"
        found = self._scratch.execute(query, (artifact, name)).fetchone()
        return None if found is None else json.loads(found[0])

    def tried_in(self, prefix: str) -> list[tuple[str, str]]:
        """Return (artifact, name) of each row of a unit that `add_tried` stored."""
        query = "SELECT artifact, name FROM tried WHERE artifact BETWEEN ? AND ?"
        bounds = ((f"{folder}/{prefix}", f"{folder}/{prefix}g") for folder in FOLDERS)
        return [row for pair in bounds for row in self._scratch.execute(query, pair)]

    def count(self, table: str) -> int:
        """Return the number of rows of `staged`, `scored`, `tried` or `changed`."""
        return int(self._scratch.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])
