"""Find the files of a scene that was filmed from two cameras, by name.

| beside `NAME.mp4` | what |
|---|---|
| `NAME.source.mp4` | the same scene from the other camera: same number of frames, times and size |
| `NAME.source.depth.npz` | its z_depth, where `preprocess.depth` is sidecar (`ex4d.depth.sidecar`) |
| `NAME.camera.json`, `NAME.source.camera.json` | the cameras of either: a pose for each frame |

NAME is the target of training, the other video its input. The cameras are `camera.json` files of
`ex4d.geometry.trajectory_files`: both in one world, in the unit of the depth; without a K, the depth's K is used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pipelines.inputs import Source, without_query


class PairFiles(NamedTuple):
    """The files beside a video that was filmed from two cameras; paths or URLs."""

    source: str
    camera: str
    source_camera: str


def files_of(path: str) -> PairFiles:
    """Return the expected paths of the other files of the video at a path or URL."""
    stem, suffix = os.path.splitext(without_query(path))
    return PairFiles(f"{stem}.source{suffix}", f"{stem}.camera.json", f"{stem}.source.camera.json")


def without_sources(found: Iterable[Source]) -> list[Source]:
    """Return the sources without those that are the other camera of another one."""
    found, others = list(found), set[str]()
    # The other camera has the longer name, so its video comes first.
    for source in sorted(found, key=lambda source: len(source.path)):
        if source.is_video and without_query(source.path) not in others:
            others.add(files_of(source.path).source)
    return [source for source in found if without_query(source.path) not in others]


def other_of(video: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a video's row on the other camera's video: its path and its content hash.

    Args:
        video: a row after the stage `identify`. Returns {} where the dataset has no pairs.
    """
    pair = video["pair"]
    if pair is None:
        return {}
    sha256, *_ = pair.get("sha256", [""])
    path = files_of(video["path"]).source if pair else ""
    return {"other_path": path, "other_sha256": sha256, "other_size_bytes": pair.get("size_bytes", 0)}


def content(sha256: str, pair: Mapping[str, Any] | None) -> str:
    """Return the key of a video: its sha256, or a hash of its own and its pair's.

    Args:
        pair: of the stage `identify`: None where the dataset has no pairs, {} where a file is missing.
    """
    if pair is None:
        return sha256
    return hashlib.sha256(" ".join([sha256, "pair", *pair.get("sha256", ())]).encode()).hexdigest()
