"""Render HTML: Jinja2 templates with autoescape, inlined assets, and a Content-Security-Policy.

A page is one file. Its policy allows the styles and the script in it, by their hashes, pictures in it, and videos in it
or beside it; nothing else runs or loads, whatever a hostile name injects.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

ASSETS = Path(__file__).with_name("assets")


@cache
def _environment() -> Environment:
    loader = PackageLoader("ex4d.viewer", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def document(template: str, title: str, styles: Sequence[str], scripts: Sequence[str] = (), **context: Any) -> bytes:
    """Return a page as UTF-8; equal arguments give equal bytes.

    Args:
        template: name of a file in `templates/` that extends base.html.
        styles, scripts: names of files in `assets/`, inlined in this order.
        context: the template's variables. Text is escaped unless it is Markup.
    """
    style, script = (
        Markup("".join((ASSETS / name).read_text(encoding="utf-8") for name in names)) for names in (styles, scripts)
    )
    page = _environment().get_template(template)
    text = page.render(title=title, style=style, script=script, policy=policy(style, script), **context)
    return text.encode("utf-8", "backslashreplace")  # a file name may hold lone surrogates


def policy(style: str, script: str) -> str:
    """Return the Content-Security-Policy of a page with one inline style and at most one inline script."""
    rules = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script) if script else "'none'",
        "img-src": "data:",
        "media-src": "data: 'self' file:",  # videos beside the page; a page opened from disk has no origin
        "connect-src": "data:",  # the mesh page reads its own pictures
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def json_block(text: str) -> Markup:
    """Escape JSON for a `<script type="application/json">`, so that nothing in it can end the element."""
    return Markup(text.replace("<", "\\u003c"))
