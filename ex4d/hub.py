"""Resolve weights from a hub or a folder: the one place that says what to download and where to put it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from ex4d.errors import ConfigError

log = logging.getLogger(__name__)

SETTLED_S = 2.0  # a file that was changed less than this long ago may change again without a change of its times

# These end up in URLs, in paths of the hub's cache and in commands that people copy.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
HUB_ID, REVISION = re.compile(f"{_PART}(/{_PART})?"), re.compile(f"{_PART}(/{_PART}){{0,9}}")


def resolve(weights: str, patterns: Sequence[str], key: str, advice: str = "") -> Path:
    """Return the local folder of weights: `weights` itself, or the snapshot of a hub id, fetched if it is not cached.

    Args:
        weights: an existing folder, or `hub-id[@revision]`.
        patterns: the files that are needed, as globs below the folder.
        key: the setting that `weights` came from, for the message.
        advice: what to do without a network; by default, to download a folder elsewhere and set `key` to it.

    Raises:
        ConfigError: neither a folder nor a hub id, or missing and not fetchable; it says what to download.
    """
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import constants  # a submodule that the package does not load
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub_id, _, revision = weights.partition("@")
    neither = "is neither an existing folder nor hub-id[@revision]"
    if not HUB_ID.fullmatch(hub_id) or (revision and not REVISION.fullmatch(revision)):
        raise ConfigError(key, weights, neither)
    try:
        path = _snapshot(hub_id, revision or None, tuple(patterns), constants.HF_HUB_CACHE)
    except HFValidationError as error:
        raise ConfigError(key, weights, neither) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        at = ["--revision", revision] if revision else []
        command = shlex.join(["hf", "download", hub_id, *at, "--local-dir", f"models/{hub_id.rpartition('/')[2]}"])
        advice = advice or (
            f"run `{command}` where there is a network "
            f"(needed: {', '.join(patterns)}), bring the folder here and set {key} to it"
        )
        raise ConfigError(
            key, weights, f"not found here and cannot be downloaded ({type(error).__name__}): {advice}"
        ) from error
    return Path(path)


@lru_cache(maxsize=64)
def _snapshot(hub_id: str, revision: str | None, patterns: tuple[str, ...], cache: str) -> str:
    """Return the folder of a snapshot; a process asks the hub once, so that all its clips use the same commit."""
    import huggingface_hub

    return huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), cache_dir=cache)


def revision_of(folder: Path) -> str | None:
    """Return the commit of a snapshot in the hub's cache, which is its folder's name; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def fingerprint(folders: Sequence[Path], patterns: Sequence[str] = ("*.json", "*.txt", "*.safetensors")) -> str:
    """Return 64 hex digits that identify the files in folders by name and content, wherever the folders are."""
    lines = []
    for number, folder in enumerate(folders):
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
            name = path.relative_to(folder)
            if not any(part.startswith(".") or part == "__pycache__" for part in name.parts):  # of tools, e.g. .cache
                lines.append(f"{file_sha256(path)}  {number}/{name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a local file; a process reads it once unless its size or times change."""
    stat, place = Path(path).stat(), str(Path(path).resolve())
    times = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return _sha256.__wrapped__(place, *times) if is_fresh([stat]) else _sha256(place, *times)


def is_fresh(facts: Iterable[os.stat_result]) -> bool:
    """Return whether a file was changed so recently that its times may miss another change: clocks are coarse."""
    return time.time() - max(fact.st_ctime for fact in facts) < SETTLED_S


@lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_of(weights: str) -> str:
    """Return a hub id as it is, but only the name of a folder, so that records are the same on every machine."""
    return Path(weights).name if Path(weights).is_dir() else weights


@lru_cache(maxsize=64)
def say_licence(name: str, weights: str, licence: str) -> None:
    """Log the licence of weights, once per process and weights."""
    log.warning("%s: weights %s, licence: %s", name, weights, licence)
