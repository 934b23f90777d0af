"""Decode text files of other programs, in any Unicode encoding, and sort names by their numbers."""

from __future__ import annotations

import codecs
import re

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(data: bytes) -> str:
    """Return the encoding that the byte order mark of a text announces: utf-16 or utf-32, else utf-8-sig."""
    return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8-sig")


def decode(data: bytes, is_cut: bool = False) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one.

    Args:
        is_cut: the data are truncated, so the last character may be incomplete; it is then dropped.

    Raises:
        ValueError: the data have none of these encodings, or hold NUL. No character is ever replaced.
    """
    encoding = encoding_of(data)
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data, final=not is_cut)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding[:6].upper()} text at byte {error.start}: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("holds NUL characters: binary data, or UTF-16 without a byte order mark; save it as UTF-8")
    return text


def in_natural_order(names: list[str]) -> list[int]:
    """Return the indices that sort names by the numbers in them, so that frame_10 follows frame_9."""
    # isdecimal, since isdigit is also true of ², which int does not read.
    keys = [
        [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", n)] for n in names
    ]
    return sorted(range(len(names)), key=lambda index: keys[index])
