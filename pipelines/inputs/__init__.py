"""From `preprocess.input` to a list of sources; a run counts what becomes of each.

A folder yields every file under it. A file is taken for a video unless its suffix says otherwise; then it is counted as
not a video, as is a picture or a video of another video's depth (`clip_depth.mp4` beside `clip.mp4`). Links out of the
folder and folders that cannot be opened are counted too (`walk`). Sidecars of a video (depth, caption, cameras) belong
to the video. A list yields what its rows name; see `lists`. Folders, files and lists
are on this machine or in any store of `storage.SCHEMES`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from ex4d import remote, storage
from ex4d.depth import places
from ex4d.errors import ConfigError
from pipelines.inputs import lists, walk
from pipelines.inputs.lists import may_be_video
from pipelines.inputs.rows import Entry, Span
from pipelines.inputs.tables import without_query

__all__ = ["Entry", "Source", "Span", "expand", "without_query"]

SIDECAR_SUFFIXES = (".camera.json", ".depth.npz", ".npz", ".depth.npy", ".npy", ".txt", ".json")
KEY = "preprocess.input"
_ONE = re.compile(r"\s*(?:[A-Za-z][\w+.-]*://[^/]*@)?[^,]*")  # of several: a comma in a password is not between them


@dataclass(frozen=True)
class Source:
    """One input file, or a row of a list that names no file.

    Args:
        path: path or URL; bytes that are not UTF-8 are Python's surrogates. "" for a bad row.
        name: the path relative to the input root, forward slashes, always valid Unicode; unique in a run. It never
            holds the user, password or query of a URL. A bad row is `LIST:NUMBER`.
        spans: its spans in lists, in their order; () is the whole file.
        twin, namesake: another video with the same stem, in the same folder or anywhere: a depth file or caption
            named by the stem could belong to it. "" where there is none.
        reason, message: why it is not opened; "" where it is.
        root: the folder or URL that it was found under; links of its sidecars may not leave it.
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
        """False where the name or the list shows that this is not a video."""
        return not self.reason

    @property
    def fate(self) -> str:
        """How a source that is not a video is counted: a stray file is filtered, a row that names no video is bad."""
        return "filtered" if self.reason in ("not_a_video", "symlink_outside", "symlink_again") else "bad"


def expand(
    given: str | Sequence[str],
    exclude: str | Path | None = None,
    root: str | None = None,
    follow_links: bool = False,
) -> list[Source]:
    """Return each input file once, sorted by name, and each row or place that cannot be used.

    Args:
        given: a file, folder, glob or list (`lists.SUFFIXES`), several of them separated by commas, or a Python
            list of them; on this machine or in a store.
        exclude: skip files under this folder (the output).
        root: folder that names in lists are relative to; None: each list's own.
        follow_links: follow links that lead out of the input folder.

    Raises:
        ConfigError: an input does not exist or cannot be opened, or nothing was found.
    """
    parts = _split(given) if isinstance(given, str) else list(given)
    everything = [entry for part in parts for entry in _expand_one(part, root, follow_links)]
    entries = everything
    if exclude is not None:
        outside = str(exclude) if not storage.is_local(str(exclude)) else os.path.abspath(exclude)
        outside = outside.rstrip("/") + "/"
        entries = [entry for entry in everything if not entry.path.startswith(outside)]
    if not entries:
        inside = "every file there is in the output folder, which is not read" if everything else "there is no file"
        raise ConfigError(KEY, given, inside)
    spans: dict[str, list[Span]] = {}
    for entry in entries:
        if not entry.reason:
            spans.setdefault(entry.path, []).extend([entry.span] if entry.span else [])
    names, roots = _names(entries), {entry.path: entry.root for entry in entries}
    videos = _videos(spans)
    plain = [
        _source(path, names[path], spans[path], roots[path], videos)
        for path in _without_sidecars(sorted(spans), videos)
    ]
    sources = _with_namesakes(plain)
    sources += [
        Source("", names[entry.path], reason=entry.reason, message=entry.message) for entry in entries if entry.reason
    ]
    return sorted(sources, key=lambda source: source.name)


def _source(path: str, name: str, spans: Sequence[Span], root: str, videos: set[str]) -> Source:
    if not may_be_video(path):
        return Source(path, name, reason="not_a_video", message="by its name")
    if _belongs(path, places.PICTURES, videos):
        message = "by its name, it shows the depth of the video beside it; depth_path reads a grey one as depth"
        return Source(path, name, reason="not_a_video", message=message)
    return Source(path, name, tuple(dict.fromkeys(spans)), root=root)


def _with_namesakes(sources: Sequence[Source]) -> list[Source]:
    """Return the sources with `twin` and `namesake`."""
    places, stems = defaultdict(list), defaultdict(list)
    for source in sources:
        if source.is_video:
            place = os.path.splitext(without_query(source.path))[0]
            places[place].append(source.name)
            stems[place.rpartition("/")[2]].append(source.name)
    result = []
    for source in sources:
        place = os.path.splitext(without_query(source.path))[0]
        same = (places[place], stems[place.rpartition("/")[2]])
        twin, namesake = (next((name for name in names if name != source.name), "") for names in same)
        result.append(replace(source, twin=twin, namesake=namesake))
    return result


def _split(text: str) -> list[str]:
    if "," not in text or os.path.lexists(text):
        return [text]
    return [part.strip() for part in _ONE.findall(text) if part.strip()]


def _expand_one(place: str, root: str | None, follow_links: bool) -> list[Entry]:
    if not place.strip():
        raise ConfigError(KEY, place, "is empty; write . for the current folder")
    if not storage.is_local(place):
        return _expand_remote(place, root, follow_links)
    path = os.path.abspath(os.path.expanduser(storage.local_path(place)))
    if os.path.isdir(path):
        return list(walk.files(path, follow_links))
    if os.path.lexists(path):
        if path.endswith(lists.SUFFIXES):
            return _expand_list(path, root, follow_links)
        return [Entry(os.path.dirname(path), path)]
    if glob.has_magic(place):
        fixed = _fixed_part(path, os.sep)
        entries: list[Entry] = []
        for match in sorted(glob.glob(path, recursive=True)):
            if os.path.isdir(match):
                entries += walk.files(match, follow_links, fixed)
            else:
                entries.append(walk.file(fixed, match, follow_links))
        if entries:
            return list({entry.path: entry for entry in entries}.values())
    raise ConfigError(KEY, place, "is not a file, a folder, or a glob that matches a file")


def _expand_remote(url: str, root: str | None, follow_links: bool) -> list[Entry]:
    shown, plain = remote.redacted(url), without_query(url)
    storage.check_url(url)
    if lists.is_page(url):
        raise ConfigError(KEY, shown, "is a web page that shows a video; download the file first")
    is_web = url.startswith(("http://", "https://"))
    try:
        if "*" in plain or (glob.has_magic(plain) and not is_web):
            entries = [Entry(_fixed_part(plain, "/"), file) for file in storage.glob(url)]
        elif plain.endswith(lists.SUFFIXES):
            return _expand_list(url, root, follow_links)
        elif not plain.endswith("/") and storage.is_file(url):
            return [Entry(plain.rpartition("/")[0], url)]
        else:
            entries = [Entry(plain, storage.join(plain, name)) for name in storage.list_files(url) if "?" not in name]
    except OSError as error:
        raise ConfigError(KEY, shown, f"cannot be read: {error.strerror}") from None
    if not entries:
        raise ConfigError(KEY, shown, "is not a file, a folder, or a glob that matches a file")
    return entries


def _expand_list(path: str, root: str | None, follow_links: bool) -> list[Entry]:
    """Return what the rows of a list name; folders and globs in a text list are expanded."""
    entries = []
    for entry in lists.read(path, root):
        is_several = entry.span is None and not entry.reason and _is_several(entry.path)
        entries += _expand_one(entry.path, root, follow_links) if is_several else [entry]
    return entries


def _is_several(path: str) -> bool:
    """Return the entry, as a bad row where its file is missing: a long list must not fail for one file."""
    if not storage.is_local(path):
        return without_query(path).endswith("/") or "*" in without_query(path)
    return os.path.isdir(path) or (glob.has_magic(path) and not os.path.lexists(path))


def _fixed_part(pattern: str, separator: str) -> str:
    pieces = pattern.split(separator)
    magic = next(index for index, piece in enumerate(pieces) if glob.has_magic(piece))
    return separator.join(pieces[:magic]) or separator


def _videos(paths: Iterable[str]) -> set[str]:
    """Return the paths that may be videos, with their suffixes and without."""
    named = [without_query(path) for path in paths if may_be_video(path)]
    return {os.path.splitext(path)[0] for path in named} | set(named)


def _belongs(path: str, suffixes: Sequence[str], videos: set[str]) -> bool:
    """Return whether a path is one of the videos' with a suffix of `suffixes` instead of, or behind, their own."""
    plain = without_query(path)
    return any(plain.removesuffix(suffix) in videos for suffix in suffixes if plain.endswith(suffix))


def _without_sidecars(paths: Iterable[str], videos: set[str]) -> Iterable[str]:
    return (path for path in paths if may_be_video(path) or not _belongs(path, SIDECAR_SUFFIXES, videos))


def _names(entries: Sequence[Entry]) -> dict[str, str]:
    """Return {path: name}: unique names relative to the deepest folder above all roots."""
    files = [entry for entry in entries if not entry.reason or entry.is_place]
    roots: dict[bool, list[str]] = {}
    for entry in files:
        roots.setdefault(storage.is_local(entry.path), []).append(_as_path(entry.root))
    common = {is_local: posixpath.commonpath(folders) for is_local, folders in roots.items()}
    if len(common) == 2:  # a name of a store's file then begins with its host or bucket
        common[False] = "/"
    names = {
        entry.path: _unicode(posixpath.relpath(_as_path(entry.path), common[storage.is_local(entry.path)]))
        for entry in files
    }
    names |= {
        entry.path: _unicode(without_query(entry.path).rpartition("/")[2])
        for entry in entries
        if entry.reason and not entry.is_place
    }
    counts = Counter(names.values())
    return {
        path: name if counts[name] == 1 else f"{name}~{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
        for path, name in names.items()
    }


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
    return os.fsencode(name).decode("utf-8", "backslashreplace")
