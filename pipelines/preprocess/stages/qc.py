"""Score the depth and the masks of a clip, and filter by these scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.preprocess.filters import decide
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def check_depth(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `depth_scores`: flicker, drift and sky of `quality.geometry`, and `depth_holes`, the fraction of pixels
    without measured depth. Raises Filtered, before masks are drawn.
    """
    from ex4d.quality import geometry

    valid = row["valid"]
    scores = geometry.measure(row["frames"], row["z_depth"])
    if "camera_depth_error" in row["depth_facts"]:
        scores["camera_depth_error"] = row["depth_facts"]["camera_depth_error"]
    scores["depth_holes"] = 0.0 if valid is None else float(1 - valid.mean(dtype="float64"))
    decide(scores, config.filters)
    return {"depth_scores": scores}


def check_masks(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `mask_scores`: `holes`, the mean fraction of holes over masks and frames; and `generation_holes` and, for
    two cameras, `warp_error`, where they are known. Raises Filtered.
    """
    scores = {"holes": float(row["hole_share"].mean(dtype="float64"))}
    scores |= {name: row[name] for name in ("generation_holes", "warp_error") if row.get(name) is not None}
    decide(scores, config.filters)
    return {"mask_scores": scores}


DEPTH = Stage(
    "depth_quality", check_depth, reads=("frames", "z_depth", "valid", "depth_facts"), writes=("depth_scores",)
)
MASKS = Stage("mask_quality", check_masks, reads=("hole_share", "generation_holes"), writes=("mask_scores",))
PAIR = replace(MASKS, reads=(*MASKS.reads, "warp_error"))
