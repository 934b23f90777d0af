"""Parse a row of a list: time spans with their captions, and the licence."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from ex4d.errors import BadSample

COLUMNS = {
    "path": ("path", "video", "video_path", "file_path", "filepath", "file", "file_name", "filename", "media_path"),
    "url": ("url", "video_url"),
    "id": ("videoid", "video_id"),
    "caption": ("caption", "text", "prompt", "captions", "description", "video_caption", "long_caption"),
    "licence": ("licence", "license"),
    "timestamp": ("timestamp", "timestamps"),
    "start": ("start_s", "start_time", "start"),
    "end": ("end_s", "end_time", "end"),
}
MAX_CAPTION_CHARS, MAX_LICENCE_CHARS = 65536, 200


class Span(NamedTuple):
    """A part of a file, with the metadata that a list gives it.

    Args:
        start_s, end_s: seconds from the first frame; end_s None: to the end.
        caption: None if the list has none.
        licence: "" if unknown.
    """

    start_s: float = 0.0
    end_s: float | None = None
    caption: str | None = None
    licence: str = ""


class Entry(NamedTuple):
    """A file with one of its spans; or a row of a list, a file or a folder that cannot be used.

    Args:
        root: folder that the file's name is relative to.
        path: absolute path or URL; `LIST:NUMBER` for a bad row.
        span: None for the whole file.
        reason, message: why the row, file or folder cannot be used; "" if it can.
        is_place: True if the file or folder at `path` cannot be used, rather than a row.
    """

    root: str
    path: str
    span: Span | None = None
    reason: str = ""
    message: str = ""
    is_place: bool = False


MAX_LIST_CHARACTERS = 100_000  # maximum length of a list written as text


def known(names: Iterable[Any]) -> dict[str, str]:
    """Return {content: column} for the COLUMNS that a table with these names has; the first synonym in COLUMNS wins."""
    there = {str(name).strip().lower().replace(" ", "_"): name for name in names}
    columns = {
        what: next((there[name] for name in aliases if name in there), None) for what, aliases in COLUMNS.items()
    }
    return {what: name for what, name in columns.items() if name is not None}


def chosen(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return {content: value} of a row, without empty values."""
    return {what: row[name] for what, name in columns.items() if row[name] not in (None, "")}


def spans(row: Mapping[str, Any]) -> list[Span]:
    """Return the spans of a row, at least one. Raises BadSample (bad_row)."""
    make = partial(Span, licence=_text(row.get("licence", ""))[:MAX_LICENCE_CHARS])
    caption = row.get("caption")
    if not {"timestamp", "start", "end"} & row.keys():  # fast, as a list may have millions of rows
        return [make(0.0, None, _caption(caption))]
    if "timestamp" not in row:
        start, end = _span(row.get("start", 0.0), row.get("end"))
        return [make(start, end, _caption(caption))]
    pairs = _parsed(row["timestamp"])
    if not isinstance(pairs, list | tuple) or not pairs:
        raise BadSample("bad_row", "timestamp is not a list")
    nested = isinstance(pairs[0], list | tuple)
    pairs = pairs if nested else [pairs]
    captions = _parsed(caption) if nested else caption  # a caption of a single span may begin with a bracket
    if not isinstance(captions, list | tuple):
        captions = [captions] * len(pairs)
    if len(captions) != len(pairs):
        raise BadSample("bad_row", f"{len(captions)} captions for {len(pairs)} spans")
    result = []
    for pair, text in zip(pairs, captions, strict=True):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadSample("bad_row", "timestamp is not a list of [start, end]")
        result.append(make(*_span(*pair), _caption(text)))
    return result


def _parsed(value: Any) -> Any:
    """Parse a list written as text, in JSON or Python; return any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "(")):
        return value
    if len(value) > MAX_LIST_CHARACTERS:  # Python's parser needs about a hundred bytes per character
        raise BadSample("bad_row", f"a list has more than {MAX_LIST_CHARACTERS} characters")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass  # not JSON: try Python
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise BadSample("bad_row", "not a valid list") from None


def _span(start: Any, end: Any) -> tuple[float, float | None]:
    start_s, end_s = seconds(start), None if end is None else seconds(end)
    if end_s is not None and end_s <= start_s:
        raise BadSample("bad_row", f"the span ends at {end_s:g} s, before it starts at {start_s:g} s")
    return start_s, end_s


def seconds(value: Any) -> float:
    """Parse a number of seconds or [[H:]MM:]SS[.fff]. Raises BadSample (bad_row)."""
    parts = str(value).strip().split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    total = sum(number * 60**power for power, number in enumerate(reversed(numbers)))
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or not math.isfinite(total):
        raise BadSample("bad_row", "not a valid time")
    return total


def _caption(value: Any) -> str | None:
    return _text(value)[:MAX_CAPTION_CHARS] if value not in (None, "") else None


def _text(value: Any) -> str:
    """Return a text as valid Unicode; surrogate pairs from JSON escapes become one character.

    Raises:
        BadSample: bad_row: the text is not UTF-8, or contains NUL.
    """
    try:
        plain = str(value)
        text = plain.strip() if plain.isascii() else plain.encode("utf-16", "surrogatepass").decode("utf-16").strip()
    except UnicodeDecodeError:
        raise BadSample("bad_row", "the text is not UTF-8: save the list as UTF-8") from None
    if "\0" in text:
        raise BadSample("bad_row", "the text holds NUL characters")
    return text
