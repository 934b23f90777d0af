"""From `preprocess.input` to the list of files, each of which must be accounted for at the end.

A folder gives every file under it: a video by its suffix or by having none that we know; what is certainly no video
by its name is named as such, and the sidecars of a video (depth, caption) belong to it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ex4d.errors import ConfigError

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".flv")
# Names that tell us there is no video to look for; all other suffixes are opened and judged by content.
OTHER_SUFFIXES = (
    *(".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".csv", ".tsv"),
    *(".parquet", ".srt", ".vtt", ".ass", ".log", ".sha256", ".md5", ".npy", ".npz", ".pt", ".safetensors", ".ckpt"),
    *(".exr", ".pfm", ".ply", ".glb", ".obj", ".tar", ".zip", ".gz", ".7z", ".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    *(".tif", ".tiff", ".gif", ".heic", ".wav", ".mp3", ".flac", ".aac", ".m4a", ".ogg", ".py", ".sh", ".toml"),
)
SIDECAR_SUFFIXES = (".depth.npz", ".npz", ".depth.npy", ".npy", ".txt", ".json")


@dataclass(frozen=True)
class Source:
    """One input file.

    Args:
        path: where it is; may hold bytes that are no UTF-8, as Python's surrogates.
        name: the path relative to the input root, forward slashes, always valid Unicode; unique in a run.
        is_video: False where the name alone says that it is none.
    """

    path: str
    name: str
    is_video: bool


def expand(given: str | Sequence[str], exclude: str | Path | None = None) -> list[Source]:
    """Return every input file, sorted by name, once each.

    Args:
        given: a file, a folder, a glob, a text list (`.txt`: one of these a line, `#` starts a comment, relative to the
            list's folder), several of them with commas between, or a list of them.
        exclude: files under this folder (the output) are left out.

    Raises:
        ConfigError: something that is named does not exist, or nothing was found.
    """
    parts = _split(given) if isinstance(given, str) else list(given)
    found: list[tuple[str, str]] = []  # (root, absolute path)
    for part in parts:
        found += _expand_one(part)
    root = os.path.commonpath([folder for folder, _ in found]) if found else ""
    outside = os.path.join(os.path.abspath(exclude), "") if exclude is not None else None
    paths = sorted({path for _, path in found if outside is None or not path.startswith(outside)})
    if not paths:
        inside = "every file there lies in preprocess.output, which is no input" if found else "no file there"
        raise ConfigError("preprocess.input", given, inside)
    sources = [Source(path, _name(path, root), _may_be_video(path)) for path in _without_sidecars(paths)]
    return sorted(sources, key=lambda source: source.name)


def _split(given: str) -> list[str]:
    if "," not in given or os.path.lexists(given):
        return [given]
    return [part.strip() for part in given.split(",") if part.strip()]


def _expand_one(given: str) -> list[tuple[str, str]]:
    if not given.strip():
        raise ConfigError("preprocess.input", given, "is empty; write . for the working folder")
    path = os.path.abspath(os.path.expanduser(given))
    if os.path.isdir(path):
        return [(path, file) for file in _walk(path)]
    if os.path.lexists(path):
        if path.endswith(".txt"):
            return _read_list(path)
        return [(os.path.dirname(path), path)]
    if glob.has_magic(given):
        matches = sorted(glob.glob(path, recursive=True))
        files = [(file, inner) for file in matches for inner in (_walk(file) if os.path.isdir(file) else [file])]
        if files:
            fixed = path.split(os.sep)
            magic = next(index for index, piece in enumerate(fixed) if glob.has_magic(piece))
            return [(os.sep.join(fixed[:magic]) or os.sep, inner) for _, inner in files]
    raise ConfigError("preprocess.input", given, "is no file, folder, or glob that matches anything")


def _read_list(path: str) -> list[tuple[str, str]]:
    folder = os.path.dirname(path)
    lines = [line.strip() for line in os.fsdecode(Path(path).read_bytes()).splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    found: list[tuple[str, str]] = []
    for name in names:
        entry = os.path.join(folder, name)
        if entry.endswith(".txt"):
            raise ConfigError("preprocess.input", entry, f"a list inside the list {path}")
        # A file that is missing is one bad row of a long list, not an error of the list.
        is_one = not os.path.isdir(entry) and not (glob.has_magic(entry) and not os.path.lexists(entry))
        found += [(folder, os.path.abspath(entry))] if is_one else _expand_one(entry)
    return found


def _walk(folder: str) -> list[str]:
    return [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if name[:5] != ".tmp-"]


def _without_sidecars(paths: Sequence[str]) -> Iterable[str]:
    videos = {os.path.splitext(path)[0] for path in paths if _may_be_video(path)}
    for path in paths:
        owners = (path.removesuffix(suffix) for suffix in SIDECAR_SUFFIXES if path.endswith(suffix))
        if _may_be_video(path) or not any(owner in videos for owner in owners):
            yield path


def _may_be_video(path: str) -> bool:
    name = os.path.basename(path).lower()
    return not name.startswith(".") and not name.endswith(OTHER_SUFFIXES)


def _name(path: str, root: str) -> str:
    relative = os.path.relpath(path, root) if root else path
    return os.fsencode(relative.replace(os.sep, "/")).decode("utf-8", "backslashreplace")
