"""Text of files that other programs wrote, in whichever Unicode encoding they chose."""

from __future__ import annotations

import codecs

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(data: bytes) -> str:
    """Return the text of UTF-8, with or without a byte order mark, or of UTF-16 or UTF-32 with one.

    Raises:
        ValueError: it is in none of these. No character is ever replaced.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding[:6].upper()} text at byte {error.start}: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("holds NUL characters: binary data, or UTF-16 without a byte order mark; save it as UTF-8")
    return text
