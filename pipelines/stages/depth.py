"""The z-depth and intrinsics of a clip, by the estimator that was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.settings import PreprocessConfig


def depth(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `z_depth` float32 [T,H,W], `K` float64 [3,3] px, and `depth_facts` for the sample's provenance.

    Raises:
        BadSample: with the reasons of the estimator and of `geometry.depth.to_z_depth`.
    """
    from ex4d.depth import DepthRequest, estimate, z_depth_of
    from ex4d.geometry import camera
    from ex4d.video import Fit

    frames = row["frames"]
    request = DepthRequest(
        video_path=row["path"],
        depth_path=config.depth_path,
        frame_index=np.asarray(row["frame_index"], np.int64),
        fit=Fit((row["size"][0], row["size"][1]), config.size, config.fit),
        seed=row["seed"],
    )
    result = estimate(config.depth, frames, request)
    z_depth = z_depth_of(result, config.profile)
    K = camera.intrinsics(config.size, config.fov_deg) if result.K is None else np.asarray(result.K, np.float64)
    known = {name: "" if value is None else value for name, value in result.provenance.items()}  # a sample has no null
    facts = {"weights_sha256": "", **known, "estimator": config.depth, "K_estimated": result.K is not None}
    return {"z_depth": z_depth, "K": K, "depth_facts": facts}


STAGE = Stage(
    "depth",
    depth,
    reads=("frames", "path", "frame_index", "size", "seed"),
    writes=("z_depth", "K", "depth_facts"),
)


def with_gpu(stage: Stage, num_gpus: float) -> Stage:
    """Return the stage, if it is this one with a share of a GPU."""
    return replace(stage, num_gpus=num_gpus) if stage is STAGE else stage
