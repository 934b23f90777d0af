"""A hook of mkdocs: a link from a page to a file of the repository outside docs/ becomes the file's path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with links that leave docs/ written as text; mkdocs itself judges all others."""
    folder = (DOCS / page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link["target"].partition("#")[0]).resolve()
        leaves = target.exists() and (target.is_dir() or not target.is_relative_to(DOCS))
        return f"{link['text']} (`{target.relative_to(DOCS.parent)}`)" if leaves else link[0]

    return re.sub(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#:\s][^)\s:]*)\)", plain, markdown)
