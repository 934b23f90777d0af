"""Paths and URLs of files, and the only gate to fsspec."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from ex4d import remote, web
from ex4d.errors import ConfigError

SCHEMES = ("file", "s3", "gs", "gcs", "hf", "http", "https", "memory")
BUCKETS = ("s3://", "gs://", "gcs://")  # stores that list names by a prefix


def is_local(url: str | Path) -> bool:
    """Return whether `url` is a path on this machine."""
    return "://" not in str(url) or str(url).startswith("file://")


def local_path(url: str | Path) -> Path:
    """Return the path of a local URL."""
    return Path(str(url).removeprefix("file://"))


def join(url: str | Path, *parts: str) -> str:
    """Return `url` with path parts appended."""
    return "/".join([str(url).rstrip("/"), *parts])


def check_url(url: str) -> None:
    """Check that a remote URL may be opened.

    Raises:
        ConfigError: a scheme that is not in SCHEMES, a chain of schemes (`zip::s3://…`), or `..` among its folders.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        what = f"allowed schemes: {', '.join(SCHEMES)}"
    elif not web.has_host(f"{scheme}://{rest.partition('/')[0]}"):
        what = "not a valid URL: its host or port cannot be read"
    elif "::" in rest or "://" in rest.partition("?")[0]:
        what = "one scheme, not a chain of them"
    elif ".." in unquote(unquote(rest)).replace("\\", "/").partition("?")[0].split("/"):
        what = "must not contain .."
    else:
        return
    raise ConfigError("url", remote.redacted(url), what)


def is_web(url: str | Path) -> bool:
    """Return whether `url` is on a web server."""
    return str(url).startswith(("http://", "https://"))


def filesystem_of(url: str | Path) -> tuple[Any, str]:
    """Return (the fsspec filesystem of a path or URL, its path in it). Raises ConfigError as `check_url`."""
    if is_local(url):
        return fsspec.core.url_to_fs(str(local_path(url)))
    url = str(url)
    check_url(url)
    scheme = url.partition("://")[0]
    # Files that others write must be seen, so listings are not cached.
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if is_web(url):
            import aiohttp

            # aiohttp's default timeout cuts off a file that takes longer than five minutes.
            waits = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": waits, **web.client_kwargs(url)}
            options["get_client"] = web.client
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(
            "url", remote.redacted(url), f"{scheme}:// needs a package that is not installed here ({error})"
        ) from error
