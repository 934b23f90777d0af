"""Expand `preprocess.input` to a list of sources; a run accounts for each of them.

A folder yields every file under it. A file is taken for a video unless its suffix says otherwise. Other files are
counted as not a video, and so are pictures and a video that holds another video's depth (`clip_depth.mp4` beside
`clip.mp4`). With `preprocess.image_fps`, a folder of pictures is one video. Links out of the folder and unreadable
folders are counted too (`walk`). Sidecars (depth, caption, cameras) belong to their video. A list yields the files
that its rows name; see `lists`. Inputs are local, or in any store of `storage.urls.SCHEMES`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ex4d import remote, storage
from ex4d.errors import ConfigError
from pipelines.inputs import lists, walk
from pipelines.inputs.rows import Entry, Span
from pipelines.inputs.sources import AnySources, Found, Source, Sources
from pipelines.inputs.tables import without_query

__all__ = ["AnySources", "Entry", "Found", "Source", "Sources", "Span", "expand", "without_query"]

KEY = "preprocess.input"
_ONE = re.compile(r"\s*(?:[A-Za-z][\w+.-]*://[^/]*@)?[^,]*")  # one of several; commas in a password do not split


def expand(
    given: str | Sequence[str],
    exclude: str | Path | None = None,
    root: str | None = None,
    follow_links: bool = False,
    pictures: bool = False,
) -> Found:
    """Return each input file once, sorted by name, and each row or place that cannot be used.

    Args:
        given: a file, folder, glob or list (`lists.SUFFIXES`), several of them separated by commas, or a Python
            list of them; local or in a store.
        exclude: skip files under this folder (the output).
        root: folder that names in lists are relative to; None: the list's own folder.
        follow_links: follow links that lead out of the input folder.
        pictures: treat each local folder of pictures as one video (`walk.files`).

    Raises:
        ConfigError: an input does not exist or cannot be opened, or nothing was found.
    """
    parts = _split(given) if isinstance(given, str) else list(given)
    rules = walk.Rules(follow_links, pictures)
    entries = (entry for part in parts for entry in _expand_one(part, root, rules))
    outside = None
    if exclude is not None:
        outside = str(exclude) if not storage.is_local(str(exclude)) else os.path.abspath(exclude)
        outside = outside.rstrip("/") + "/"
    skipped = 0

    def kept() -> Iterator[Entry]:
        nonlocal skipped
        for entry in entries:
            if outside is not None and entry.path.startswith(outside):
                skipped += 1
            else:
                yield entry

    sources = Found(kept())
    if not len(sources):
        inside = "every file there is in the output folder, which is not read" if skipped else "there is no file"
        raise ConfigError(KEY, given, inside)
    return sources


def _split(text: str) -> list[str]:
    if "," not in text or os.path.lexists(text):
        return [text]
    return [part.strip() for part in _ONE.findall(text) if part.strip()]


def _expand_one(place: str, root: str | None, rules: walk.Rules) -> Iterable[Entry]:
    if not place.strip():
        raise ConfigError(KEY, place, "is empty; write . for the current folder")
    if not storage.is_local(place):
        return _expand_remote(place, root, rules)
    path = os.path.abspath(os.path.expanduser(storage.local_path(place)))
    if os.path.isdir(path):
        return walk.files(path, rules)
    if os.path.lexists(path):
        if path.endswith(lists.SUFFIXES):
            return _expand_list(path, root, rules)
        return [Entry(os.path.dirname(path), path)]
    if glob.has_magic(place):
        fixed = _fixed_part(path, os.sep)
        entries: list[Entry] = []
        for match in sorted(glob.glob(path, recursive=True)):
            if os.path.isdir(match):
                entries += walk.files(match, rules, fixed)
            else:
                entries.append(walk.file(fixed, match, rules))
        if entries:
            return list({entry.path: entry for entry in entries}.values())
    raise ConfigError(KEY, place, "is not a file, a folder, or a glob that matches a file")


def _expand_remote(url: str, root: str | None, rules: walk.Rules) -> Iterable[Entry]:
    shown, plain = remote.redacted(url), without_query(url)
    storage.check_url(url)
    if lists.is_page(url):
        raise ConfigError(KEY, shown, "is a web page that shows a video; download the file first")
    try:
        if "*" in plain or (glob.has_magic(plain) and not storage.is_web(url)):
            entries = [Entry(_fixed_part(plain, "/"), file) for file in storage.glob(url)]
        elif plain.endswith(lists.SUFFIXES):
            return _expand_list(url, root, rules)
        elif not plain.endswith("/") and storage.is_file(url):
            return [Entry(plain.rpartition("/")[0], url)]
        else:
            entries = [Entry(plain, storage.join(plain, name)) for name in storage.list_files(url) if "?" not in name]
    except OSError as error:
        raise ConfigError(KEY, shown, f"cannot be read: {error.strerror}") from None
    if not entries:
        raise ConfigError(KEY, shown, "is not a file, a folder, or a glob that matches a file")
    return entries


def _expand_list(path: str, root: str | None, rules: walk.Rules) -> Iterator[Entry]:
    """Yield the entries of a list; folders and globs in a list are expanded."""
    for entry in lists.read(path, root):
        is_several = entry.span is None and not entry.reason and _is_several(entry.path)
        yield from _expand_one(entry.path, root, rules) if is_several else (entry,)


def _is_several(path: str) -> bool:
    """Return True if a path stands for many files: a folder or a pattern."""
    if not storage.is_local(path):
        return without_query(path).endswith("/") or "*" in without_query(path)
    return os.path.isdir(path) or (glob.has_magic(path) and not os.path.lexists(path))


def _fixed_part(pattern: str, separator: str) -> str:
    pieces = pattern.split(separator)
    magic = next(index for index, piece in enumerate(pieces) if glob.has_magic(piece))
    return separator.join(pieces[:magic]) or separator
