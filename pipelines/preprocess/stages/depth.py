"""Compute z-depth and intrinsics of a clip with the selected estimator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.preprocess import fetch
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def depth(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `z_depth` float32 [T,H,W], `K` float64 [3,3] px, `depth_facts` for the sample's provenance,
    `absolute`: True if the depth has a unit, that of its file or the metre, `valid` bool [T,H,W]: True where depth was
    measured (None: everywhere), and `source_w2c` float64 [T,4,4] in the unit of the depth and `dynamic_mask` bool
    [T,H,W], each None if unknown.

    Raises:
        BadSample: with the reasons of the estimator and of `geometry.depth.to_z_depth`.
    """
    from ex4d.depth import dynamic, estimate, z_depth_of
    from ex4d.geometry import camera
    from ex4d.video import Fit

    frames = row["frames"]
    y, x, height, width = row["box"]
    request = replace(
        fetch.depth_request(row, config, row["path"]),
        depth_path=fetch.depth_path(row, config),
        frame_s=np.asarray(row["frame_s"]),
        source_frames=row["source_frames"],
        source_s=row["source_s"],
        frame_index=np.asarray(row["frame_index"], np.int64),
        fit=Fit((row["size"][0], row["size"][1]), config.size, config.fit, (y, x, height, width)),
        seed=row["seed"],
        device="cuda" if config.depth_num_gpus else "cpu",  # Ray does not hide GPUs from tasks that reserve none
        batch_size=config.depth_batch_size,
        fov_deg=config.fov_deg,
        fill_px=config.depth_fill_px,
        cameras=config.cameras,
        python=config.depth_python,
    )
    result = estimate(config.depth, frames, request)
    z_depth = z_depth_of(result, config.profile)
    K = camera.intrinsics(config.size, config.fov_deg) if result.K is None else np.asarray(result.K, np.float64)
    known = {name: "" if value is None else value for name, value in result.provenance.items()}  # no null in a sample
    facts = {"weights_sha256": "", **known, "estimator": config.depth, "K_estimated": result.K is not None}
    absolute = result.metric or result.kind == "z_depth"
    w2c = result.w2c if absolute else None  # otherwise the depth was mapped to another unit
    moves = result.dynamic_mask
    if moves is None and config.persistent_frames:
        moves = dynamic.of_flow(frames, z_depth, K, w2c)
    told = {"source_w2c": w2c, "dynamic_mask": moves, "valid": result.valid_mask}
    return {"z_depth": z_depth, "K": K, "depth_facts": facts, "absolute": absolute, **told}


STAGE = Stage(
    "depth",
    depth,
    reads=(
        *("frames", "path", "depth_file", "depth_place", "frame_index", "size", "box", "seed", "name", "twin"),
        *("namesake", "frame_s", "source_frames", "source_s"),
    ),
    writes=("z_depth", "K", "depth_facts", "absolute", "valid", "source_w2c", "dynamic_mask"),
)
