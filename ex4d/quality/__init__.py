"""Scores of a shot, a clip and its depth, which are always recorded and may be filtered by thresholds.

A score is one finite float, the same on every run. Scores of a shot come from cut detection, those of a clip from its
downscaled frames, so that clips are filtered before the expensive stages.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The meaning of a score, for docs and pages.

    Args:
        meaning: one sentence.
        keep: "min": a clip is kept at or above a threshold; "max": at or below.
        suggested: a threshold measured in `docs/decisions/preprocess.md`; None if no measurement justifies one.
        stage: the stage that measures it.
    """

    meaning: str
    keep: str
    suggested: float | None = None
    stage: str = "score"


SCORES: dict[str, Score] = {
    "motion": Score("mean absolute change of luma from frame to frame", "min", 0.002),
    "camera_motion": Score("speed of the picture under one affine motion, longer sides a second", "min"),
    "object_motion": Score("share of the texture that moves otherwise than the whole picture", "max"),
    "sharpness": Score("share of the gradient that a small blur takes away", "min", 0.4),
    "exposure": Score("mean luma", "min", 0.05),
    "still": Score("share of frames that repeat the one before", "max", 0.6),
    "text": Score("share of the picture under lines of overlaid text", "max", 0.005),
    "bars": Score("share of the picture that black bars took and the crop box leaves out", "max"),
    "source_side": Score("shorter side of what the clip is made of, inside black bars, px", "min", 32.0),
    "hdr": Score("1 where the source is HDR (PQ or HLG), which is tone-mapped", "max"),
    "interlaced": Score("1 where the source is interlaced, which is deinterlaced", "max"),
    "texture": Score("share of the picture with a gradient of two levels a pixel and more", "min", 0.02),
    "logo": Score("share of a corner under edges that stay while the picture moves", "max", 0.1),
    "depth_flicker": Score("jitter of log depth along the flow, frame to frame", "max", stage="depth_quality"),
    "depth_drift": Score("change of the depth's scale over the clip, log", "max", stage="depth_quality"),
    "sky": Score("share of the depth beyond 20 × the near depth", "max", stage="depth_quality"),
    "depth_holes": Score("share of pixels for which a depth camera had no value", "max", stage="depth_quality"),
    "camera_depth_error": Score(
        "median log ratio of the depth and of what the source's cameras triangulate, where these are found from motion",
        "max",
        stage="depth",
    ),
    "holes": Score("mean hole share of the clip's masks", "max", stage="mask_quality"),
    "generation_holes": Score(
        "mean hole share of the clip along masks.generation, which that of its masks should match",
        "max",
        stage="mask_quality",
    ),
    "warp_error": Score(
        "mean difference of the clip and what is warped to it from its other camera, where that shows something",
        *("max", 0.05),
        stage="mask_quality",
    ),
}
