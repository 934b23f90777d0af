"""Videos of one scene from two cameras, by the names of their files.

| beside `NAME.mp4` | what |
|---|---|
| `NAME.source.mp4` | the same scene from the other camera: as many frames, at the same times, of the same size |
| `NAME.source.depth.npz` | its z_depth, where `preprocess.depth` is sidecar (`ex4d.depth.sidecar`) |
| `NAME.camera.json`, `NAME.source.camera.json` | the cameras of either: a pose for each frame |

NAME is what a model learns to make, the other video what it is given. The cameras are `camera.json` files of
`ex4d.geometry.trajectory_files`: both in one world, in the unit of the depth; where they say no K, it is the depth's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.inputs import Source, without_query


class PairFiles(NamedTuple):
    """The files beside a video that was filmed from two cameras; paths or URLs."""

    source: str
    camera: str
    source_camera: str


def files_of(path: str) -> PairFiles:
    """Return where the further files of the video at a path or URL must lie."""
    stem, suffix = os.path.splitext(without_query(path))
    return PairFiles(f"{stem}.source{suffix}", f"{stem}.camera.json", f"{stem}.source.camera.json")


def without_sources(found: Sequence[Source]) -> list[Source]:
    """Return the sources without those that are the other camera of one that stays."""
    others: set[str] = set()
    # The name of another camera is longer than that of its video, so that one comes first.
    for source in sorted(found, key=lambda source: len(source.path)):
        if source.is_video and without_query(source.path) not in others:
            others.add(files_of(source.path).source)
    return [source for source in found if without_query(source.path) not in others]


def other_of(video: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a video's row that say where the other camera's is and what it is by its bytes.

    Args:
        video: a row after the stage `identify`; {} where no pair is asked for.
    """
    pair = video["pair"]
    if pair is None:
        return {}
    sha256, *_ = pair.get("sha256", [""])
    path = files_of(video["path"]).source if pair else ""
    return {"other_path": path, "other_sha256": sha256, "other_size_bytes": pair.get("size_bytes", 0)}


def content(sha256: str, pair: Mapping[str, Any] | None) -> str:
    """Return what a video is known by: its sha256, or one of it and of its pair.

    Args:
        pair: of the stage `identify`: None where no pair is asked for, {} where a file is missing.
    """
    if pair is None:
        return sha256
    return hashlib.sha256(" ".join([sha256, "pair", *pair.get("sha256", ())]).encode()).hexdigest()
