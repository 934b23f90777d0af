"""List the files of a folder, local or in an object store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ex4d import remote
from ex4d.storage.urls import BUCKETS, filesystem_of, is_local, is_web, local_path
from ex4d.threads import in_order


def list_files(url: str | Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Return every file under a folder, sorted, as relative paths with forward slashes; [] if it does not exist.

    Args:
        suffixes: keep only names with one of these suffixes, in lower case with the dot; () keeps all.
    """
    return sorted(name for name, _ in list_sizes(url) if not suffixes or name.lower().endswith(suffixes))


def list_sizes(url: str | Path, prefixes: Iterable[str] = ("",)) -> Iterator[tuple[str, int]]:
    """Yield (name, bytes) of every file under a folder, named as by `list_files`; 0 if a server does not tell the size.

    Args:
        prefixes: all that names may begin with; a bucket, which lists a thousand names per request, is asked for many
            of them at once. Other stores ignore them.
    """
    if is_local(url):
        yield from _walk(local_path(url), "")
        return
    filesystem, path = filesystem_of(url)
    asked = prefixes if str(url).startswith(BUCKETS) else ("",)
    for sizes in in_order(lambda prefix: _sizes(filesystem, path, url, prefix), asked, 32):
        yield from ((name, size) for name, size in sizes if not name.rpartition("/")[2].startswith(".tmp-"))


def _walk(folder: Path, above: str) -> Iterator[tuple[str, int]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(Path(entry), f"{above}{entry.name}/")
            elif entry.is_file() and not entry.name.startswith(".tmp-"):
                yield above + entry.name, entry.stat().st_size


def _sizes(filesystem: Any, path: str, url: str | Path, prefix: str) -> list[tuple[str, int]]:
    # A web server's folders are walked page by page; without on_error, a page that fails counts as empty.
    options = ({"on_error": "raise"} if is_web(url) else {}) | ({"prefix": prefix} if prefix else {})
    root, found = str(PurePosixPath(path)).rstrip("/") + "/", {}
    with suppress(FileNotFoundError):
        found = remote.call(lambda: filesystem.find(path, detail=True, **options), str(url))
    plain = ((str(PurePosixPath(name)) if "//" in name else name, facts) for name, facts in found.items())
    inside = ((name.removeprefix(root), facts) for name, facts in plain if name.startswith(root))
    return [(name, facts.get("size") or 0) for name, facts in inside if name]


def glob(url: str) -> list[str]:
    """Return the URLs of the remote files that match a pattern (`*`, `**`, `?`, `[…]`), sorted."""
    filesystem, path = filesystem_of(url)
    found = remote.call(lambda: filesystem.glob(path, detail=True), url)
    return sorted(filesystem.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file")
