"""The thresholds on scores that decide which clips are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass

from ex4d.config import checked, setting
from ex4d.errors import Filtered
from ex4d.quality import SCORES
from ex4d.quality.own import OWN


@dataclass(frozen=True)
class FilterConfig:
    """Thresholds on scores; null is off, and the score is recorded either way. `quality.SCORES` defines each score.

    `preprocess.score_only=true` shows what each would keep; docs/decisions/preprocess.md has the figures behind them.
    Three are on by default, against useless clips: black pictures, blank ones, and those of a few pixels.
    """

    min_motion: float | None = setting(
        None, "Change of luma from frame to frame; 0.002 drops still pictures.", ge=0, le=1
    )
    max_motion: float | None = setting(None, "Change of luma from frame to frame.", ge=0, le=1)
    min_camera_motion: float | None = setting(
        None, "Camera motion, in longer sides of the picture per second; 0.02 drops cameras at rest.", ge=0
    )
    max_camera_motion: float | None = setting(None, "Camera motion, in longer sides of the picture per second.", ge=0)
    max_object_motion: float | None = setting(
        None, "Fraction of the texture that moves differently from the camera, parallax included.", ge=0, le=1
    )
    min_sharpness: float | None = setting(None, "Sharpness; 0.4 drops blurred clips.", ge=0, le=1)
    min_exposure: float | None = setting(0.01, "Mean luma; 0.01 drops black clips, 0.05 dark ones.", ge=0, le=1)
    max_exposure: float | None = setting(None, "Mean luma.", ge=0, le=1)
    min_texture: float | None = setting(
        0.02, "Fraction of the picture with a gradient; 0.02 drops blank pictures with a dot or a line.", ge=0, le=1
    )
    min_source_side: float | None = setting(
        32.0, "Shorter side of the source inside black bars, px; 32 drops what is not a picture.", ge=0
    )
    max_hdr: float | None = setting(None, "0 drops HDR videos (PQ, HLG), which are tone-mapped.", ge=0, le=1)
    max_interlaced: float | None = setting(None, "0 drops interlaced videos, which are deinterlaced.", ge=0, le=1)
    max_still: float | None = setting(None, "Fraction of repeated frames; 0.6 drops slide-shows.", ge=0, le=1)
    max_text: float | None = setting(None, "Fraction of the picture under text; 0.005 finds most.", ge=0, le=1)
    max_bars: float | None = setting(None, "Fraction of the source picture that black bars covered.", ge=0, le=1)
    max_logo: float | None = setting(None, "Fraction of a corner under a logo; 0.1 finds most.", ge=0, le=1)
    max_depth_flicker: float | None = setting(None, "Frame-to-frame jitter of log depth.", ge=0)
    max_depth_drift: float | None = setting(None, "Change of the depth's scale over the clip, log.", ge=0)
    max_sky: float | None = setting(None, "Fraction of the depth that is far away.", ge=0, le=1)
    max_depth_holes: float | None = setting(
        None, "Fraction of the clip without measured depth, after preprocess.depth_fill_px.", ge=0, le=1
    )
    max_camera_depth_error: float | None = setting(
        None, "Disagreement between depth and the cameras estimated from motion, log.", ge=0
    )
    min_holes: float | None = setting(None, "Mean fraction of holes in the masks.", ge=0, le=1)
    max_holes: float | None = setting(None, "Mean fraction of holes in the masks.", ge=0, le=1)
    max_warp_error: float | None = setting(
        None, "Two cameras: difference between warp and clip; 0.05 drops wrong cameras and units.", ge=0, le=1
    )

    def __post_init__(self) -> None:
        checked(self, "preprocess.filters")


@dataclass(frozen=True)
class ScorerConfig:
    """A score of your own and its thresholds: docs/how-to/own-score.md. It runs in the actor of the depth stage."""

    file: str = setting(
        MISSING, "Python file with `score(model, frames, fps)` and `load(weights, device)`.", not_empty=True
    )
    weights: str | None = setting(None, "Passed to `load`: a file, a folder or an id; null: None.")
    min: float | None = setting(None, "Drop clips whose score is lower; null: off.")
    max: float | None = setting(None, "Drop clips whose score is higher; null: off.")
    num_gpus: float = setting(
        0.0,
        "Share of a GPU; 0: on the CPU. The actor gets the largest share of scorer, depth network and captioner.",
        ge=0,
        le=1,
    )

    def __post_init__(self) -> None:
        checked(self, "preprocess.scorer")


def decide(scores: Mapping[str, float], filters: FilterConfig, scorer: ScorerConfig | None = None) -> None:
    """Raise Filtered with the name of the first score that misses its threshold, if any."""
    for name in (*SCORES, OWN):
        score = scores.get(name)
        limits = (getattr(filters, f"min_{name}", None), getattr(filters, f"max_{name}", None))
        low, high = (scorer.min, scorer.max) if name == OWN and scorer is not None else limits
        if score is not None and low is not None and score < low:
            raise Filtered(name, score, low)
        if score is not None and high is not None and score > high:
            raise Filtered(name, score, high)
