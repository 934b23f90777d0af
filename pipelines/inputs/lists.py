"""Lists of videos: a text file with one path per line, or a table with captions, licences and time spans.

A table is CSV (with commas, semicolons or tabs), TSV, Parquet, JSON (a list of objects) or JSON lines. Its columns are
recognised by name, in any order and case (`rows.COLUMNS`); a warning lists unused columns:

| content | columns |
|---|---|
| file | `path`, `video` (OpenVid-1M, DiffSynth), `file_path` (VideoX-Fun), `file_name` (Hugging Face); else `url` |
| caption | `caption`, `text`, `prompt`, `description`, the first of these that exists |
| licence | `licence`, `license` |
| span | `start_s`, `end_s`; or `timestamp`: [start, end] (Koala-36M), or a list of these (Panda-70M) |
| id at the site | `videoID`: if `url` is a web page, the file is ID.mp4 or similar in the list's folder |

Times are seconds or H:MM:SS. If `timestamp` is a list of spans, `caption` may be a list with one text per span; both
may be written as Python or JSON. A row names one or more spans of a file, or the whole file; a file may appear in
several rows. A row that cannot be used becomes an Entry with a reason: `bad_row`, `not_a_file_url` (a web page that
shows a video), `url_not_allowed`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ex4d import remote, storage, text
from ex4d.errors import BadSample, ConfigError
from ex4d.video import sniff
from pipelines.inputs import rows, tables
from pipelines.inputs.rows import Entry
from pipelines.inputs.tables import without_query

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".csv", ".tsv", ".parquet", ".json", ".jsonl")
# Suffixes of files that are not videos; files with any other suffix are opened and judged by their content.
OTHER_SUFFIXES = (
    *(".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".csv", ".tsv"),
    *(".parquet", ".srt", ".vtt", ".ass", ".log", ".sha256", ".md5", ".npy", ".npz", ".pt", ".safetensors", ".ckpt"),
    *(".exr", ".pfm", ".ply", ".glb", ".obj", ".tar", ".zip", ".gz", ".7z", ".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    *(".tif", ".tiff", ".heic", ".wav", ".mp3", ".flac", ".aac", ".m4a", ".ogg", ".py", ".sh", ".toml"),
)
MAX_NAME = 16384  # maximum characters of a path or URL; signed URLs have about two thousand
# Sites whose URLs are web pages with a player.
PAGES = ("youtube.com", "youtu.be", "vimeo.com", "dailymotion.com", "bilibili.com", "tiktok.com", "facebook.com")


def may_be_video(path: str) -> bool:
    """Return False if the name shows that this is not a video; a local WebP is a video if it is animated."""
    name = without_query(path).rpartition("/")[2].lower()
    if name.endswith(".webp") and storage.is_local(path) and os.path.isfile(path):
        with suppress(OSError), open(path, "rb") as file:
            return sniff.is_animated_webp(file.read(32))
    return not name.startswith(".") and not name.endswith(OTHER_SUFFIXES)


def is_page(url: str) -> bool:
    """Return True for the URL of a web page that shows a video."""
    if not storage.is_web(url):
        return False
    host = url.partition("://")[2].partition("/")[0].rpartition("@")[2].partition(":")[0].lower()
    return any(host == page or host.endswith("." + page) for page in PAGES)


def read(path: str, root: str | None = None) -> Iterator[Entry]:
    """Yield the entries of each row of a list, in order.

    Args:
        path: absolute path or URL of the list.
        root: folder that names are relative to; None: the list's own folder.

    Raises:
        ConfigError: the list cannot be read, or no column names files.
    """
    folder = root or without_query(path).rpartition("/")[0] or "/"
    if storage.is_local(folder):
        folder = os.path.abspath(os.path.expanduser(folder))
    resolver = _Resolver(path, folder)
    shown = remote.redacted(path)
    try:
        if without_query(path).endswith(".txt"):
            yield from _read_text(resolver)
            return
        table = tables.read(path)
        columns = _columns(list(next(table)), shown)
        for number, row in enumerate(table, start=1):
            yield from resolver.of_row(number, row if isinstance(row, str) else rows.chosen(row, columns))
    except UnicodeError:  # its byte order mark says UTF-16 or UTF-32, but it does not decode
        raise ConfigError("preprocess.input", shown, "does not decode as its byte order mark says") from None
    except OSError as error:
        raise ConfigError("preprocess.input", shown, f"cannot be read: {error.strerror}") from None


def _columns(names: list[Any], shown: str) -> dict[str, str]:
    """Return {content: column}. Raises ConfigError if no column names files, or two columns have the same name."""
    columns = rows.known(names)
    if "path" not in columns and "url" not in columns:
        wanted = (*rows.COLUMNS["path"], *rows.COLUMNS["url"])
        there = ", ".join(str(name)[:40] for name in names[:8]) or "nothing"
        what = f"needs a column of {', '.join(wanted)}; its first line has {there}"
        raise ConfigError("preprocess.input", shown, what)
    if twice := [name for name in columns.values() if names.count(name) > 1]:
        raise ConfigError("preprocess.input", shown, f"has two columns named {twice[0]}")
    if unused := [str(name) for name in names if name not in columns.values()]:
        logger.warning("%s: unused columns: %s", shown, ", ".join(name[:40] for name in unused[:20]))
    return columns


def _read_text(resolver: _Resolver) -> Iterator[Entry]:
    with storage.open_read(resolver.listing) as file:
        data = tables.whole(file, resolver.listing)
    encoding = text.encoding_of(data)
    # File names may hold arbitrary bytes; surrogateescape preserves them in a UTF-8 list.
    lines = data.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict").splitlines()
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        name = name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name
        if name and not name.startswith("#"):
            yield from resolver.of_line(number, name)


class _Resolver:
    """Converts the rows of one list to entries."""

    def __init__(self, listing: str, folder: str):
        self.listing, self.folder = listing, folder
        self._stems: dict[str, str] | None = None

    def of_line(self, number: int, name: str) -> Iterator[Entry]:
        """Yield the entry of a line of text."""
        if without_query(name).endswith(SUFFIXES):
            raise ConfigError("preprocess.input", remote.redacted(name), f"is a list inside the list {self.listing}")
        try:
            path = self._place(name)
        except BadSample as error:
            yield self._bad(number, error)
            return
        yield Entry(path.rpartition("/")[0] if self._is_elsewhere(path) else self.folder, path)

    def of_row(self, number: int, row: Mapping[str, Any] | str) -> Iterator[Entry]:
        """Yield an entry for each span of a row."""
        try:
            if isinstance(row, str):
                raise BadSample("bad_row", row)
            path = self._file(row)
            spans = rows.spans(row)
        except BadSample as error:
            yield self._bad(number, error)
            return
        root = path.rpartition("/")[0] if self._is_elsewhere(path) else self.folder
        yield from (Entry(root, path, span) for span in spans)

    def _bad(self, number: int, error: BadSample) -> Entry:
        return Entry(self.folder, f"{self.listing}:{number}", None, error.reason, error.message)

    def _is_elsewhere(self, path: str) -> bool:
        return storage.is_local(path) != storage.is_local(self.folder) or not path.startswith(self.folder)

    def _file(self, row: Mapping[str, Any]) -> str:
        place = row.get("path", row.get("url"))
        if not isinstance(place, str) or not place.strip():
            raise BadSample("bad_row", "names no file")
        if "\0" in place or len(place) > MAX_NAME:
            raise BadSample("bad_row", f"names a file with a NUL character, or by more than {MAX_NAME} characters")
        place = place.strip()
        if is_page(place):
            downloaded = self._by_stem(str(row.get("id", "")), place)
            if downloaded is None:
                raise BadSample("not_a_file_url", "a page that shows a video, without its file beside the list")
            return downloaded
        return self._place(place)

    def _place(self, name: str) -> str:
        """Return the absolute path or URL of the file that a row names. Raises BadSample."""
        if len(name) > MAX_NAME:
            raise BadSample("bad_row", f"names a file by more than {MAX_NAME} characters")
        if "://" not in name and storage.is_local(self.folder):
            return os.path.abspath(os.path.join(self.folder, name))
        if "://" not in name:
            if name.startswith("/"):
                raise BadSample("url_not_allowed", "a list in a store must not name a path on this machine")
            name = storage.join(self.folder, name)
        elif storage.is_local(name):
            if not storage.is_local(self.listing):
                raise BadSample("url_not_allowed", "a list in a store must not name a path on this machine")
            return os.path.abspath(storage.local_path(name))
        try:
            storage.check_url(name)
        except ConfigError as error:
            raise BadSample("url_not_allowed", error.allowed) from None
        return name

    def _by_stem(self, name: str, url: str) -> str | None:
        """Return the file in the list's folder that is named by the video's id at its site, or None."""
        if self._stems is None:
            there = os.listdir(self.folder) if storage.is_local(self.folder) else storage.list_files(self.folder)
            files = sorted(name for name in there if "/" not in name and name.lower().endswith(sniff.VIDEO_SUFFIXES))
            self._stems = {os.path.splitext(name)[0]: name for name in reversed(files)}
        parts = urlsplit(url)
        candidates = (name, *parse_qs(parts.query).get("v", []), parts.path.rpartition("/")[2])
        file = next((self._stems[stem] for stem in candidates if stem in self._stems), None)
        return None if file is None else storage.join(self.folder, file)
