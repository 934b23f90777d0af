"""Decode the planned frames of a clip, cropped and scaled to the clip's size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ex4d.isolation import File
from pipelines.preprocess import fetch
from pipelines.preprocess.stages import isolated
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def decode(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `frames` uint8 [T,H,W,3] RGB. Raises BadSample with the reasons of `video.decode`."""
    frames = isolated.call(
        config, "decode", File(fetch.video(row, config)), row["pts"], config.size, config.fit, "pyav", tuple(row["box"])
    )
    return {"frames": frames}


STAGE = Stage("decode", decode, reads=("path", "sha256", "pts", "box"), writes=("frames",))
