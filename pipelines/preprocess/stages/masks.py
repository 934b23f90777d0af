"""Simulate the masks of a clip: each frame's DW-Mesh seen along random trajectories, and tracked points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def masks(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `visible` bool [S,T,H,W], `kind` uint8 [S], `hole_share` float32 [S,T], `w2c`: S of [T][4][4] or None, and
    `generation_holes`: mean fraction of holes in the clip's warps along `masks.generation`, None if that is empty.
    """
    from ex4d.geometry import masks as simulated
    from ex4d.geometry.mask_scene import SourceMotion
    from pipelines.preprocess.settings import gpu_share

    moved = (row["source_w2c"], config.source_motion, float(row["fps"]))
    source = SourceMotion(*moved, config.persistent_frames, row["dynamic_mask"])
    device = "cuda" if gpu_share(config) else "cpu"  # of cotracker3, with which the stage is in the actor of the GPU
    clip = (row["frames"], row["z_depth"], row["K"])
    drawn = simulated.draw(*clip, config.masks, row["seed"], row["valid"], source, device)
    return {
        "visible": drawn.visible,
        "kind": drawn.kind,
        "hole_share": drawn.hole_share,
        "w2c": [None if path is None else path.tolist() for path in drawn.w2c],
        "generation_holes": float(drawn.generation.mean(dtype="float64")) if len(drawn.generation) else None,
    }


STAGE = Stage(
    "masks",
    masks,
    reads=("frames", "z_depth", "K", "valid", "seed", "source_w2c", "dynamic_mask", "fps"),
    writes=("visible", "kind", "hole_share", "w2c", "generation_holes"),
)
