"""The sources of a run, in a scratch database on this machine: the rows of a million videos take gigabytes."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple
from urllib.parse import unquote

from ex4d import storage
from ex4d.depth import places
from pipelines.inputs.lists import may_be_video
from pipelines.inputs.rows import Entry, Span
from pipelines.inputs.tables import without_query
from pipelines.runtime.scratch import scratch

CHUNK = 5000  # entries that are inserted at a time
SIDECAR_SUFFIXES = (".camera.json", ".depth.npz", ".npz", ".depth.npy", ".npy", ".txt", ".json")

DEPTH = "by its name, it shows the depth of the video beside it; depth_path reads a grey one as depth"


class Source(NamedTuple):
    """One input file, or a row of a list that names no file.

    Args:
        path: path or URL; bytes that are not UTF-8 are Python's surrogates. "" for a bad row.
        name: path relative to the input root, with forward slashes, always valid Unicode; unique in a run. It never
            contains the user, password or query of a URL. `LIST:NUMBER` for a bad row.
        spans: spans that lists give it, in their order; () is the whole file.
        twin, namesake: another video with the same stem, in the same folder (twin) or anywhere (namesake), to which a
            depth file or caption named by the stem could belong. "" if there is none.
        reason, message: why the file is not used; "" if it is.
        root: folder or URL under which it was found; links of its sidecars must not leave it.
    """

    path: str
    name: str
    spans: tuple[Span, ...] = ()
    twin: str = ""
    namesake: str = ""
    reason: str = ""
    message: str = ""
    root: str = ""

    @property
    def is_video(self) -> bool:
        """False if the name or the list shows that this is not a video."""
        return not self.reason

    @property
    def fate(self) -> str:
        """Fate of a source that is not a video: a stray file is filtered, a row that names no video is bad."""
        return "filtered" if self.reason in ("not_a_video", "symlink_outside", "symlink_again") else "bad"


class Sources:
    """Sources in a given order, which can be iterated over repeatedly."""

    def __init__(self, sources: Iterable[Source]):
        self._scratch = scratch()
        self._scratch.execute("CREATE TABLE source (number INTEGER PRIMARY KEY, is_video INTEGER, body TEXT)")
        rows = ((source.is_video, _packed(source)) for source in sources)
        self._scratch.executemany("INSERT INTO source (is_video, body) VALUES (?, ?)", rows)

    def __len__(self) -> int:
        return int(self._scratch.execute("SELECT COUNT(*) FROM source").fetchone()[0])

    def __iter__(self) -> Iterator[Source]:
        return (_unpacked(body) for (body,) in self._scratch.execute("SELECT body FROM source ORDER BY number"))

    @cached_property
    def num_videos(self) -> int:
        """Number of sources that may be videos."""
        return int(self._scratch.execute("SELECT COUNT(*) FROM source WHERE is_video").fetchone()[0])


def _packed(source: Source) -> str:
    names = (source.path, source.name, source.twin, source.namesake, source.reason, source.message, source.root)
    return json.dumps([*names, source.spans])


def _unpacked(body: str) -> Source:
    path, name, twin, namesake, reason, message, root, spans = json.loads(body)
    return Source(path, name, tuple(Span(*span) for span in spans), twin, namesake, reason, message, root)


class Found:
    """The entries of an input as Sources, sorted by name.

    All entries are read first, since names, twins and sidecars depend on all of them. Iteration yields each file once,
    without the sidecars of videos, and each row or place that cannot be used.
    """

    def __init__(self, entries: Iterable[Entry]):
        self._scratch = scratch()
        execute = self._scratch.execute
        execute(
            "CREATE TABLE entry (number INTEGER PRIMARY KEY, path BLOB, reason TEXT, message TEXT, "
            "start_s REAL, end_s REAL, caption TEXT, licence TEXT)"
        )
        execute(
            "CREATE TABLE file (path BLOB PRIMARY KEY, root BLOB, is_good INTEGER, is_named INTEGER, is_video INTEGER, "
            "is_depth INTEGER DEFAULT 0, name TEXT, place BLOB, stem BLOB)"
        )
        self._roots: set[str] = set()
        self._add(entries)
        self._name()
        self._sort_out()

    def _add(self, entries: Iterable[Entry]) -> None:
        columns = "path, reason, message, start_s, end_s, caption, licence"
        add_entry = f"INSERT INTO entry ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        add_file = (
            "INSERT INTO file (path, root, is_good, is_named, is_video, place, stem) VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET root = excluded.root, is_good = is_good OR excluded.is_good, "
            "is_video = is_video OR excluded.is_video"
        )
        rest = iter(entries)
        while some := list(islice(rest, CHUNK)):
            self._roots |= {entry.root for entry in some if not entry.reason or entry.is_place}
            self._scratch.executemany(add_file, map(_file, some))
            told = (entry for entry in some if entry.span is not None or entry.reason)
            self._scratch.executemany(add_entry, map(_entry, told))

    def _name(self) -> None:
        """Give each file a unique name relative to the common parent of all roots."""
        roots: dict[bool, list[str]] = {}
        for root in self._roots:
            roots.setdefault(storage.is_local(root), []).append(_as_path(root))
        common = {is_local: posixpath.commonpath(found) for is_local, found in roots.items()}
        if len(common) == 2:  # names of files in stores then begin with the host or bucket
            common[False] = "/"

        def name(key: bytes, is_named: int) -> str:
            path = _text(key)
            if not is_named:
                return _unicode(without_query(path).rpartition("/")[2])
            return _unicode(_relative(_as_path(path), common[storage.is_local(path)]))

        def unlike(name: str, key: bytes) -> str:
            return f"{name}~{hashlib.sha256(os.fsencode(_text(key))).hexdigest()[:8]}"

        self._scratch.create_function("name_of", 2, name, deterministic=True)
        self._scratch.create_function("unlike", 2, unlike, deterministic=True)
        execute = self._scratch.execute
        execute("UPDATE file SET name = name_of(path, is_named)")
        execute("CREATE INDEX file_name ON file (name)")
        execute("CREATE TEMP TABLE twice AS SELECT name FROM file GROUP BY name HAVING COUNT(*) > 1")
        execute("UPDATE file SET name = unlike(name, path) WHERE name IN (SELECT name FROM twice)")

    def _sort_out(self) -> None:
        """Mark videos that hold the depth of another video, and drop sidecars, which are no sources."""
        execute = self._scratch.execute
        execute("CREATE INDEX file_place ON file (place, path) WHERE is_video")
        execute("CREATE INDEX file_stem ON file (stem, path) WHERE is_video")
        execute("CREATE INDEX entry_path ON entry (path, number)")
        for is_video, suffixes, change in ((1, places.PICTURES, "is_depth = 1"), (0, SIDECAR_SUFFIXES, "is_good = 0")):
            files = (
                _text(key) for (key,) in execute("SELECT path FROM file WHERE is_good AND is_video = ?", (is_video,))
            )
            found = [(_key(path),) for path in files if self._belongs(path, suffixes)]
            self._scratch.executemany(f"UPDATE file SET {change} WHERE path = ?", found)

    def __len__(self) -> int:
        return self._counts[0] + self._counts[1]

    @property
    def num_videos(self) -> int:
        """Number of sources that may be videos."""
        return self._counts[2]

    @cached_property
    def _counts(self) -> tuple[int, int, int]:
        """Numbers of files, of entries that cannot be used, and of files that may be videos."""
        files = "SELECT COUNT(*), COALESCE(SUM(is_video AND NOT is_depth), 0) FROM file WHERE is_good"
        (num_files, num_videos), (num_bad,) = (
            self._scratch.execute(query).fetchone()
            for query in (files, "SELECT COUNT(*) FROM entry WHERE reason != ''")
        )
        return num_files, num_bad, num_videos

    def __iter__(self) -> Iterator[Source]:
        return heapq.merge(self._files(), self._refused(), key=lambda source: source.name)

    def _files(self) -> Iterator[Source]:
        shared = {}  # stems that several videos share; twins are looked up only for these
        for column in ("place", "stem"):
            shared[column] = f"SELECT {column} FROM file WHERE is_video GROUP BY {column} HAVING COUNT(*) > 1"
        query = (
            f"SELECT file.path, name, root, place, stem, is_video, is_depth, place IN ({shared['place']}), "
            f"stem IN ({shared['stem']}), start_s, end_s, caption, licence FROM file LEFT JOIN entry ON "
            "entry.path = file.path AND start_s IS NOT NULL WHERE is_good ORDER BY name, file.path, entry.number"
        )
        for _, rows in groupby(self._scratch.execute(query), key=itemgetter(0)):
            first, *others = rows
            key, name, root, place, stem, is_video, is_depth, has_twin, has_namesake, *span = first
            path = _text(key)
            twin = self._other("place", place, name) if has_twin or not is_video else ""
            namesake = self._other("stem", stem, name) if has_namesake or not is_video else ""
            if not is_video or is_depth:
                yield Source(path, name, (), twin, namesake, "not_a_video", DEPTH if is_depth else "by its name")
                continue
            spans = (Span(*span),) if span[0] is not None else ()
            if others:
                spans = tuple(dict.fromkeys([*spans, *(Span(*row[-len(span) :]) for row in others)]))
            yield Source(path, name, spans, twin, namesake, root=_text(root))

    def _other(self, column: str, value: bytes, name: str) -> str:
        """Return the first other video that shares this place or stem, "" if there is none."""
        query = f"SELECT name FROM file WHERE is_video AND {column} = ? AND NOT is_depth ORDER BY path LIMIT 2"
        return next((other for (other,) in self._scratch.execute(query, (value,)) if other != name), "")

    def _refused(self) -> Iterator[Source]:
        query = (
            "SELECT name, reason, message FROM entry JOIN file USING (path) WHERE reason != '' ORDER BY name, number"
        )
        for name, reason, message in self._scratch.execute(query):
            yield Source("", name, reason=reason, message=message)

    def _belongs(self, path: str, suffixes: Sequence[str]) -> bool:
        """Return True if `path` is a video's path with a suffix of `suffixes` in place of its own, or appended."""
        plain = without_query(path)
        if not plain.endswith(tuple(suffixes)):  # fast, as there may be millions of files
            return False
        for owner in (plain.removesuffix(suffix) for suffix in suffixes if plain.endswith(suffix)):
            for place in {owner, os.path.splitext(owner)[0]}:
                query = "SELECT path FROM file WHERE is_video AND place = ?"
                for (key,) in self._scratch.execute(query, (_key(place),)):
                    if place == owner or without_query(_text(key)) == owner:
                        return True
        return False


AnySources = Sources | Found


def _file(entry: Entry) -> tuple[Any, ...]:
    is_good, place = not entry.reason, _key(os.path.splitext(without_query(entry.path))[0])
    facts = (_key(entry.root), is_good, is_good or entry.is_place, is_good and may_be_video(entry.path))
    return _key(entry.path), *facts, place, place.rpartition(b"/")[2]


def _entry(entry: Entry) -> tuple[Any, ...]:
    return _key(entry.path), entry.reason, entry.message, *(entry.span or (None,) * len(Span._fields))


def _key(path: str) -> bytes:
    """Return a path as bytes that sort like the text, even if it contains surrogates."""
    return path.encode("utf-8", "surrogatepass")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")


def _relative(path: str, common: str) -> str:
    start = common.rstrip("/") + "/"
    if path.startswith(start) and "//" not in path and "/." not in path:
        return path[len(start) :]
    return posixpath.relpath(path, common)


def _as_path(place: str) -> str:
    """Return an absolute path for a path or URL: /BUCKET/KEY or /HOST/PATH, without secrets."""
    if storage.is_local(place):
        return place.replace(os.sep, "/")
    plain = without_query(place).partition("://")[2]
    netloc, _, path = plain.partition("/")
    if place.startswith(("http://", "https://")):
        path = unquote(path, errors="surrogateescape")
    return f"/{netloc.rpartition('@')[2]}/{path}"


def _unicode(name: str) -> str:
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")
