"""Fetch the files that a row needs to this machine, and reuse what an earlier run learned about them."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ex4d import hub, remote, storage, web
from ex4d.config import fingerprint
from pipelines.inputs import without_query
from pipelines.preprocess.file_cache import FileCache
from pipelines.runtime.stage import Row

if TYPE_CHECKING:
    from ex4d.depth import DepthRequest
    from pipelines.preprocess.settings import PreprocessConfig


def reach(config: PreprocessConfig) -> AbstractContextManager[None]:
    """Return a context in which only hosts that the settings allow are contacted."""
    return web.rules(private="any" if config.allow_private_hosts else "none")


def sidecar_rules(function: Callable[[Row, Any], Mapping[str, Any]], row: Row, config: Any) -> Mapping[str, Any]:
    """Call a stage's function under `reach`; within it, only videos may redirect to another host."""
    with reach(config), web.rules(same_host=True):
        return function(row, config)


def video(row: Mapping[str, Any], config: PreprocessConfig) -> str:
    """Return the local path of a row's video; the file stays until this process requests another one.

    Raises:
        BadSample: unreadable, truncated_download, source_changed.
    """
    path = row["path"]
    if storage.is_local(path):
        is_folder = config.image_fps is not None and os.path.isdir(path)
        return str(_cache(config).get(path, row["sha256"], "video", config.image_fps)) if is_folder else path
    with web.rules(same_host=False):
        return str(_cache(config).get(path, row["sha256"], "video"))


def depth_request(row: Mapping[str, Any], config: PreprocessConfig, path: str) -> DepthRequest:
    """Return the DepthRequest that locates the depth of the video at `path`: a row's own video or its pair's."""
    from ex4d.depth import DepthRequest

    plain = without_query(path)
    name = (PurePosixPath(row["name"]).parent / plain.rpartition("/")[2]).as_posix()
    return DepthRequest(plain, config.depth_path, name, row["twin"], row["namesake"])


def depth_path(row: Mapping[str, Any], config: PreprocessConfig) -> str | None:
    """Return the `depth_path` for the estimator: `config.depth_path`, or the local copy of a remote sidecar.

    Raises:
        BadSample: see `video`.
    """
    if not row["depth_file"] or storage.is_local(row["depth_place"]):
        return config.depth_path
    name, _, digest = row["depth_file"].rpartition(":")
    return str(_cache(config).get(row["depth_place"], digest, name))


class MustRead(Exception):
    """A file is not known, or has changed, so it would have to be read."""


def check_may_read(may_read: bool) -> None:
    """Raise MustRead unless a file may be read."""
    if not may_read:
        raise MustRead


@dataclass(frozen=True)
class Remote:
    """The files of one remote video, with what is known of them, to save requests to the store.

    Args:
        there: result of `storage.beside`.
        known: {kind: result of `digest` in an earlier run}.
        may_read: False: `digest` raises MustRead instead of reading a file.
        fetched: {kind: result of `digest` in this run}; its URLs are redacted, since it goes into the ledger.
        urls: {kind: the URL that was read}.
    """

    url: str
    there: Mapping[str, tuple[int, str]] | None
    known: Mapping[str, Any]
    may_read: bool = True
    fetched: dict[str, dict[str, Any]] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)

    def exists(self, url: str) -> bool:
        """Return True if a file exists; for files beside the video, the store's listing decides."""
        folder, _, name = url.rpartition("/")
        if self.there is None or folder != self.url.rpartition("/")[0]:
            return storage.exists(url)
        return name in self.there

    def digest(self, url: str, config: PreprocessConfig, kind: str) -> tuple[str, int]:
        """Return (sha256, bytes) of a file, from an earlier run if its store reports no change.

        Otherwise the file is read and cached. Raises OSError.
        """
        known: Any = self.known.get(kind)
        with _redirects(kind):
            size, tag = self._facts(url)
            shown = remote.redacted(url)
            if not (tag and _is_note(known) and (known["url"], known["tag"]) == (shown, tag)):
                check_may_read(self.may_read)
                name = "video" if kind == "video" else url.rpartition("/")[2]
                sha256, size_bytes = _cache(config).add(url, name, size)
                known = {"url": shown, "tag": tag, "sha256": sha256, "size_bytes": size_bytes}
        self.fetched[kind], self.urls[kind] = known, url
        return known["sha256"], known["size_bytes"]

    def lasting(self) -> dict[str, dict[str, Any]]:
        """Return {kind: facts for the next run}, without files that were replaced meanwhile."""
        fresh = {kind: found for kind, found in self.fetched.items() if found is not self.known.get(kind)}
        now = Remote(self.url, storage.beside(self.url), {}) if fresh else self
        for kind, found in fresh.items():
            with _redirects(kind):
                if not found["tag"] or now._facts(self.urls[kind])[1] != found["tag"]:
                    del self.fetched[kind]
        return self.fetched

    def _facts(self, url: str) -> tuple[int | None, str]:
        folder, _, name = url.rpartition("/")
        if self.there is None or folder != self.url.rpartition("/")[0]:
            return storage.size_and_tag(url)
        if name not in self.there:
            raise FileNotFoundError(errno.ENOENT, "No such file", remote.redacted(url))
        return self.there[name]


@dataclass(frozen=True)
class Local:
    """The files of one local video; if their hashes are known, another run reads only changed files.

    Args:
        known: {kind: result of `digest` in an earlier run}.
        may_read: False: `digest` raises MustRead instead of reading a file.
        found: {kind: result of `digest` in this run, for the next one}.
    """

    known: Mapping[str, Any]
    may_read: bool = True
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def digest(self, paths: Sequence[str], kind: str, read: Callable[[], str]) -> tuple[str, int]:
        """Return (sha256, bytes of the first file), from an earlier run if no file has changed since. Raises OSError.

        Args:
            read: reads the files and returns their sha256.
        """
        known: Any = self.known.get(kind)
        tag = _stamp(paths)
        if not (tag and _is_note(known) and (known["url"], known["tag"]) == (paths[0], tag)):
            check_may_read(self.may_read)
            known = {"url": paths[0], "sha256": read(), "size_bytes": storage.local_path(paths[0]).stat().st_size}
            known["tag"] = tag if _stamp(paths) == tag else ""
        if known["tag"]:
            self.found[kind] = known
        return known["sha256"], known["size_bytes"]


def _stamp(paths: Sequence[str]) -> str:
    """Return a string that changes with local files; "" if they changed a moment ago and may be changing still.

    On Linux's own file systems a program can set a file's modification time (mtime), but not its change time (ctime).
    """
    facts = [storage.local_path(path).stat() for path in paths]
    if hub.is_fresh(facts):
        return ""
    stamps = [[fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns, fact.st_ino] for fact in facts]
    return " ".join(map(str, stamps[0])) if len(stamps) == 1 else fingerprint([list(paths), stamps])


def _redirects(kind: str) -> AbstractContextManager[None]:
    """Return a context in which videos may redirect to another host, but sidecars may not."""
    return web.rules(same_host=False) if kind == "video" else nullcontext()


def _is_note(known: Any) -> bool:
    """Return True if a record is valid; its hash becomes part of a path."""
    if not isinstance(known, dict) or type(known.get("size_bytes")) is not int:
        return False
    return isinstance(known.get("sha256"), str) and bool(storage.SHA256.fullmatch(known["sha256"]))


_CACHES: dict[tuple[int, str, int, int], FileCache] = {}
_LOCK = threading.Lock()


def _cache(config: PreprocessConfig) -> FileCache:
    """Return this process's view of the cache."""
    folder = config.cache_dir or os.path.join(tempfile.gettempdir(), f"ex4d-cache-{os.getuid()}")
    key = (os.getpid(), folder, config.cache_mb, config.max_file_mb)
    with _LOCK:
        if key not in _CACHES:
            _CACHES[key] = FileCache(Path(folder).expanduser(), config.cache_mb << 20, config.max_file_mb << 20)
        return _CACHES[key]
