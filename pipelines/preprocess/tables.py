"""What a run knows of its videos and clips, in a scratch database, since a million videos take gigabytes."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from pipelines.runtime.stage import Row

UNIT_VIDEOS = 2000  # maximum videos of a unit, if content hashes are evenly distributed
HEX = "0123456789abcdef"
_TABLES = (
    "video (content TEXT, name TEXT, sha256 TEXT, pair INTEGER, body TEXT, PRIMARY KEY (content, name))",
    "staged (split TEXT, key TEXT, artifact TEXT, size INTEGER, sha256 BLOB, PRIMARY KEY (split, key))",
    "decided (sha256 TEXT PRIMARY KEY, source_group TEXT, stand_in TEXT) WITHOUT ROWID",
    "work (number INTEGER PRIMARY KEY, rows BLOB)",
    "scored (key TEXT PRIMARY KEY, body TEXT) WITHOUT ROWID",
    "superseded (name TEXT PRIMARY KEY) WITHOUT ROWID",
    "tried (artifact TEXT, name TEXT, refusal TEXT, PRIMARY KEY (artifact, name))",
)


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

    Args:
        database: the ledger's, whose table `record` is joined.
    """

    def __init__(self, database: sqlite3.Connection):
        self._scratch = database
        for table in _TABLES:
            self._scratch.execute(f"CREATE TABLE {table}")

    # ------------------------------------------------------------ videos

    def add_video(self, row: Row) -> bool:
        """Add a hashed video; return True if it is the first with its `content`."""
        known = self._scratch.execute("SELECT 1 FROM video WHERE content = ?", (row["content"],)).fetchone()
        values = (row["content"], row["name"], row["sha256"], "other_sha256" in row, json.dumps(row))
        self._scratch.execute("INSERT INTO video VALUES (?, ?, ?, ?, ?)", values)
        return known is None

    def duplicates(self) -> Iterator[tuple[Row, str]]:
        """Yield each video whose content also exists under an alphabetically earlier name, with that name."""
        query = (
            "SELECT body, first FROM video JOIN (SELECT content AS one, MIN(name) AS first FROM video GROUP BY content "
            "HAVING COUNT(*) > 1) ON content = one WHERE name > first ORDER BY name"
        )
        return ((json.loads(body), first) for body, first in self._scratch.execute(query))

    def videos(self, prefix: str = "") -> Iterator[Row]:
        """Yield the first video of each content that begins with `prefix`, sorted by content."""
        return (json.loads(body) for body, *_ in self._firsts(prefix))

    def without_record(self, digests: Sequence[str]) -> Iterator[Row]:
        """Yield the videos, as `videos` does, that have no record with one of these digests in its name."""
        lacks = " AND ".join(
            "NOT EXISTS (SELECT 1 FROM record WHERE name = 'videos/' || content || ?)" for _ in digests
        )
        suffixes = [f".{digest}.json" for digest in digests]
        return (json.loads(body) for body, *_ in self._firsts("", f"AND {lacks}", suffixes))

    def identities(self, digest: str) -> Iterator[tuple[str, str, str]]:
        """Yield (sha256, other_sha256, facts) of each video with a record. facts: JSON of hashes, size, duration_s and
        the hashes of the other camera's video.
        """
        query = (
            "SELECT content, sha256, iif(pair, json_extract(video.body, '$.other_sha256'), ''), "
            "json_extract(record.body, '$.hashes', '$.info.size', '$.info.duration_s', '$.other.hashes') "
            "FROM video JOIN record ON record.name = 'videos/' || content || ? "
            "WHERE json_extract(record.body, '$.refusal') IS NULL ORDER BY content, video.name"
        )
        last = None
        for content, *found in self._scratch.execute(query, (f".{digest}.json",)):
            if content != last:
                yield tuple(found)
            last = content

    def unit(self, prefix: str) -> bytes:
        """Return the videos of a unit as JSON: [row, its group, name of the video that replaces it]; None: its own."""
        parts = [f"[{body},{json.dumps(group)},{json.dumps(name)}]" for body, group, name in self._firsts(prefix)]
        return f"[{','.join(parts)}]".encode()

    def _firsts(
        self, prefix: str, more: str = "", values: Sequence[str] = ()
    ) -> Iterator[tuple[str, str | None, str | None]]:
        query = (
            "SELECT content, body, source_group, stand_in FROM video LEFT JOIN decided USING (sha256) "
            f"WHERE content BETWEEN ? AND ? {more} ORDER BY content, name"
        )
        last = None
        for content, body, group, stand_in in self._scratch.execute(query, (prefix, f"{prefix}g", *values)):
            if content != last:
                yield body, group, stand_in
            last = content

    def drop_video(self, content: str) -> None:
        """Delete a video that is rejected and has no record."""
        self._scratch.execute("DELETE FROM video WHERE content = ?", (content,))

    def decide(self, groups: Mapping[str, str], stand_ins: Mapping[str, str]) -> None:
        """Store decisions across videos: {sha256: its group} and {sha256: the video that replaces it}."""
        names = self._names(set(stand_ins.values()))
        rows = ((key, groups.get(key), names.get(stand_ins.get(key, ""))) for key in {*groups, *stand_ins})
        self._scratch.executemany("INSERT INTO decided VALUES (?, ?, ?)", rows)

    def _names(self, contents: Set[str]) -> dict[str, str]:
        """Return {sha256: the first name of a video of that sha256}."""
        if contents:
            self._scratch.execute("CREATE INDEX IF NOT EXISTS video_sha256 ON video (sha256, name)")
        query = "SELECT MIN(name) FROM video WHERE sha256 = ?"
        return {sha256: self._scratch.execute(query, (sha256,)).fetchone()[0] for sha256 in contents}

    def units(self) -> list[str]:
        """Return prefixes of content hashes that divide the videos into units."""
        count = self._scratch.execute("SELECT COUNT(*) FROM video").fetchone()[0]
        units = [""]
        while count > UNIT_VIDEOS * len(units):
            units = [prefix + letter for prefix in units for letter in HEX]
        return units

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

    def staged(self) -> Iterator[Clip]:
        """Yield the finished samples in packing order."""
        rows = self._scratch.execute("SELECT * FROM staged ORDER BY split, key")
        return (Clip(split, key, artifact, size, digest.hex()) for split, key, artifact, size, digest in rows)

    def artifact(self, key: str) -> str:
        """Return the artifact of a finished sample."""
        return str(self._scratch.execute("SELECT artifact FROM staged WHERE key = ?", (key,)).fetchone()[0])

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

    def tried_in(self, prefix: str) -> list[str]:
        """Return the artifacts that `add_tried` stored for the clips of a unit."""
        query = "SELECT artifact FROM tried WHERE artifact BETWEEN ? AND ? ORDER BY artifact"
        found: list[str] = []
        for folder in ("clips", "scores"):
            bounds = (f"{folder}/{prefix}", f"{folder}/{prefix}g")
            found += [artifact for (artifact,) in self._scratch.execute(query, bounds)]
        return found

    def count(self, table: str) -> int:
        """Return the number of rows of `staged`, `scored` or `tried`."""
        return int(self._scratch.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])
