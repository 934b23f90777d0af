"""The thresholds on scores that decide which clips are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ex4d.errors import Filtered
from ex4d.quality import SCORES


@dataclass(frozen=True)
class FilterConfig:
    """Thresholds on scores; None is off, and the score is kept either way. `quality.SCORES` says what each score is.

    `preprocess.score_only=true` shows what each would keep; docs/decisions/preprocess.md has the figures behind them.

    Args:
        min_motion, max_motion: change of luma from frame to frame; 0.002 drops still pictures.
        min_camera_motion, max_camera_motion: longer sides a second; 0.02 drops cameras that rest.
        max_object_motion: share of the texture that moves by itself, parallax included.
        min_sharpness: 0.4 drops what is blurred.
        min_exposure, max_exposure: mean luma.
        max_still: share of repeated frames; 0.6 drops slide-shows.
        max_text, max_logo: share of the picture under text, of a corner under a logo; 0.005 and 0.1 find most.
        max_bars: share that black bars took, where cropping them (`crop_bars`) leaves too little.
        max_depth_flicker, max_depth_drift: jitter and drift of log depth.
        max_sky: share of the depth that is far away.
        min_holes, max_holes: mean hole share of the masks.
        max_warp_error: of two cameras, the warp's difference from the clip; 0.05 drops wrong cameras and units.
    """

    min_motion: float | None = None
    max_motion: float | None = None
    min_camera_motion: float | None = None
    max_camera_motion: float | None = None
    max_object_motion: float | None = None
    min_sharpness: float | None = None
    min_exposure: float | None = None
    max_exposure: float | None = None
    max_still: float | None = None
    max_text: float | None = None
    max_bars: float | None = None
    max_logo: float | None = None
    max_depth_flicker: float | None = None
    max_depth_drift: float | None = None
    max_sky: float | None = None
    min_holes: float | None = None
    max_holes: float | None = None
    max_warp_error: float | None = None


def decide(scores: Mapping[str, float], filters: FilterConfig) -> None:
    """Return nothing where a clip passes. Raises Filtered, named after the first score that misses its threshold."""
    for name in SCORES:
        score = scores.get(name)
        low: float | None = getattr(filters, f"min_{name}", None)
        high: float | None = getattr(filters, f"max_{name}", None)
        if score is not None and low is not None and score < low:
            raise Filtered(name, score, low)
        if score is not None and high is not None and score > high:
            raise Filtered(name, score, high)
