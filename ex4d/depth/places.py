"""Find the depth file of a video: beside it, or in a folder of depth files that mirrors the folder of videos.

| video | depth: the first of these that exists |
|---|---|
| `in/a/clip.mp4` | `in/a/clip.depth.npz`, `clip.npz`, `clip.depth.npy`, `clip.npy`, a folder `clip.depth/` of PNG or |
| | OpenEXR, or `clip.disparity/` of OpenEXR |
| with `depth_path: maps` | `maps/a/clip.depth.npz` … as above, a video `clip_depth.mp4`, ViPE's `depth/clip.zip`; |
| | then in `maps/` |

If `clip.mov` lies beside `clip.mp4`, each needs its own file, such as `clip.mp4.depth.npz`; if `in/b/clip.mp4` exists,
too, `maps/a/` and `maps/b/` are needed. A file that could belong to another video is never used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ex4d import hub, storage
from ex4d.depth import DepthRequest, pictures, videos, vipe
from ex4d.errors import BadSample
from ex4d.video import sniff

SUFFIXES = (".depth.npz", ".npz", ".depth.npy", ".npy")
FOLDERS = (".depth", ".disparity")  # of pictures of depth, one per frame
VIDEOS = (".mp4", ".mkv")
VIPE = ".zip"
# Written by other programs beside or instead of their npz: 8-bit pictures to look at, or formats not read here.
PICTURES = (*videos.SUFFIXES, "_vis.mp4", "_vis.mkv", ".depth.exr", ".depth.png", ".depth.avi", "_depth.avi")


def find(request: DepthRequest, exists: Callable[[str], bool] = storage.exists) -> str:
    """Find the path of the clip's depth file, or of its folder of pictures.

    Args:
        exists: returns whether a file or folder exists.

    Raises:
        BadSample: depth_missing; sidecar_ambiguous, if the file could belong to another video.
    """
    chosen = None if request.depth_path is None else str(request.depth_path)
    if chosen and chosen.lower().endswith((".npz", ".npy", VIPE, *VIDEOS)) and not _is_folder(chosen):
        if not exists(chosen):
            raise BadSample("depth_missing", f"no depth file {PurePosixPath(chosen).name}")
        return chosen
    video = PurePosixPath(request.video_path)
    own = PurePosixPath(request.name or video.name)
    if not chosen:
        folders = [request.video_path.rpartition("/")[0] or "."]
    elif str(own.parent) == ".":
        folders = [chosen]
    else:
        folders = [storage.join(chosen, str(own.parent)), chosen]
    suffixes = (*SUFFIXES, *FOLDERS, *(videos.SUFFIXES if chosen else ()))
    if request.twin:
        whole = _first(
            [
                storage.join(folder, own.name + suffix)
                for folder in folders
                for suffix in suffixes
                if suffix not in FOLDERS
            ],
            exists,
        )
        if whole:
            return whole
    for depth, folder in enumerate(folders):
        other = request.twin or (request.namesake if depth else "")
        candidates = [storage.join(folder, own.stem + suffix) for suffix in suffixes]
        if chosen:
            candidates.append(storage.join(folder, f"depth/{own.stem}{VIPE}"))
        file = _first(candidates, exists)
        if file and other:
            raise BadSample("sidecar_ambiguous", ambiguous(PurePosixPath(file).name, own, other, bool(request.twin)))
        if file:
            return file
    if chosen and not request.name and _is_folder(chosen) and pictures.files_in(chosen):
        return chosen
    raise BadSample("depth_missing", _what_is_missing(folders, own))


def ambiguous(file: str, own: PurePosixPath, other: str, is_twin: bool) -> str:
    """Return a sentence that says which two videos a file could belong to, and what to do."""
    suffix = file.removeprefix(own.stem)
    remedy = f"name it {own.name}{suffix}" if is_twin else f"put it at {own.parent / file} in the folder of depth files"
    return f"{file} may belong to {own} or to {other}: {remedy}"


def twin_of(path: str) -> str:
    """Return the name of another video with the same stem beside a local one, "" if there is none."""
    place = Path(path)
    if not storage.is_local(path) or not place.parent.is_dir():
        return ""
    others = (other for other in sorted(os.listdir(place.parent)) if other != place.name)
    beside = (other for other in others if other.lower().endswith(sniff.VIDEO_SUFFIXES))
    return next((other for other in beside if Path(other).stem == place.stem), "")


def sha256(path: str) -> str:
    """Return the sha256 of a depth file; of several files, that of their names and hashes. Raises OSError."""
    if not storage.is_local(path):
        return storage.sha256(path)
    place = storage.local_path(path)
    files = sorted(pictures.files_in(place)) if place.is_dir() else [place, *others_of(path)]
    # Cached: every clip of a long video needs the hash of the same file, which may be gigabytes.
    if files == [place]:
        return hub.file_sha256(place)
    lines = [f"{file.name} {hub.file_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def others_of(path: str) -> list[Path]:
    """Return the files that belong to a depth file: the pictures of a folder; ViPE's poses and intrinsics."""
    if not storage.is_local(path):
        return []
    if storage.local_path(path).is_dir():
        return pictures.files_in(path)
    return vipe.parts_of(storage.local_path(path)) if path.lower().endswith(VIPE) else []


def _first(candidates: list[str], exists: Callable[[str], bool]) -> str:
    for candidate in candidates:
        if candidate.endswith(FOLDERS):
            if _is_folder(candidate):
                return candidate
        elif exists(candidate):
            return candidate
    return ""


def _is_folder(path: str) -> bool:
    return storage.is_local(path) and storage.local_path(path).is_dir()


def _what_is_missing(folders: list[str], own: PurePosixPath) -> str:
    odd = [own.stem + suffix for folder in folders for suffix in PICTURES if _is_there(folder, own.stem + suffix)]
    if odd and odd[0].endswith(videos.SUFFIXES):
        return f"{odd[0]} may hold relative disparity or not: where near is bright, set depth_path to its folder"
    if odd:
        return f"{odd[0]} is a picture of depth, or a format that is not read: write the values as {own.stem}.depth.npz"
    return f"no depth file; looked for {', '.join(own.stem + suffix for suffix in SUFFIXES)}"


def _is_there(folder: str, name: str) -> bool:
    return storage.is_local(folder) and storage.local_path(storage.join(folder, name)).exists()
