"""Clean text from outside before it is shown or stored: escape control characters, remove passwords."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

SECRET = "(not kept)"
# C0 except tab and newline, C1, and characters that change the direction or line of text: all can hide or fake output.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_URL = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s"'<>]*""")
_STORES = ("s3", "s3a", "gs", "gcs", "hf", "file")
_NEXT = re.compile(r",(?=[A-Za-z][A-Za-z0-9+.-]*://)")


def printable(text: str) -> str:
    """Escape control and bidirectional characters of text, for terminals and logs."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """Make text safe for a terminal or a log: `printable`, and its URLs `without_secrets`."""
    return printable(without_secrets(text))


class Shown:
    """A text stream that passes text through `shown`; a carriage return at the start is kept.

    Args:
        raw: the underlying stream, for a terminal's own control sequences.
    """

    def __init__(self, raw: TextIO):
        self.raw = raw

    def write(self, text: str) -> int:
        """Write text; return its length."""
        lead = "\r" if text.startswith("\r") else ""  # of a progress line
        self.raw.write(lead + shown(text.removeprefix(lead)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def shown_output() -> Iterator[None]:
    """Pass everything that is printed inside the block through `shown`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Shown(terminal(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def terminal(stream: Any) -> TextIO:
    """Return the stream under a Shown, for a library that prints control sequences and gets no untrusted text."""
    return stream.raw if isinstance(stream, Shown) else stream


def redacted(url: str) -> str:
    """Remove user, password, query and fragment, which may be secret, from a URL; return other text unchanged.

    In the URL of a store (s3://, gs://), `?` and `#` are characters of a name or a pattern, and are kept.
    """
    if "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in _STORES:
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    netloc, slash, path = rest.partition("/")
    return f"{scheme}://{netloc.rpartition('@')[2]}{slash}{path}"


def without_secrets(value: Any) -> Any:
    """Return JSON-serialisable values with URLs `redacted`; SECRET marks where something was removed."""
    if isinstance(value, dict):
        return {name: without_secrets(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(child) for child in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    # One text may hold several URLs, separated by commas; a password may also hold a comma.
    return ",".join(_URL.sub(_without, part) for part in _NEXT.split(value))


def _without(match: re.Match) -> str:
    plain = redacted(match[0])
    return match[0] if plain == match[0] else plain.replace("://", f"://{SECRET}", 1)
