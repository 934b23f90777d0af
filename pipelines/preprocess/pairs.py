"""Find the files of a scene that was filmed from two cameras, by name.

| beside `NAME.mp4` | contents |
|---|---|
| `NAME.source.mp4` | the same scene from the other camera: same number of frames, times and size |
| `NAME.source.depth.npz` | its z_depth, if `preprocess.depth` is sidecar (`ex4d.depth.sidecar`) |
| `NAME.camera.json`, `NAME.source.camera.json` | the two cameras: a pose for each frame |

NAME is the target of training, the other video is its input. The cameras are `camera.json` files as read by
`ex4d.geometry.trajectory_files`, in a common world and in the unit of the depth; without a K, the depth's K is used.
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
    """Return the sources without those that are another source's second camera."""
    found, others = list(found), set[str]()
    # The second camera's name is longer, so its video comes after the target's.
    for source in sorted(found, key=lambda source: len(source.path)):
        if source.is_video and without_query(source.path) not in others:
            others.add(files_of(source.path).source)
    return [source for source in found if without_query(source.path) not in others]


def other_of(video: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns about the other camera's video in a video's row: its path, content hash and size.

    Args:
        video: a row after the stage `identify`. Returns {} if the dataset has no pairs.
    """
    pair = video["pair"]
    if pair is None:
        return {}
    sha256, *_ = pair.get("sha256", [""])
    path = files_of(video["path"]).source if pair else ""
    return {"other_path": path, "other_sha256": sha256, "other_size_bytes": pair.get("size_bytes", 0)}


def content(sha256: str, pair: Mapping[str, Any] | None) -> str:
    """Return the key of a video: its sha256, or for pairs a hash of its own and its pair's.

    Args:
        pair: from the stage `identify`: None if the dataset has no pairs, {} if a file is missing.
    """
    if pair is None:
        return sha256
    return hashlib.sha256(" ".join([sha256, "pair", *pair.get("sha256", ())]).encode()).hexdigest()
