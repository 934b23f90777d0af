"""What a clip looks like in three numbers, and the thresholds that decide on them before the dear stages run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d.errors import Filtered
from pipelines.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.settings import PreprocessConfig

_SIDE = 128  # scores are taken at this longer side, so that thresholds do not depend on the clip's size


@dataclass(frozen=True)
class FilterConfig:
    """Thresholds on scores; None is off, and the score is kept either way.

    Args:
        min_motion, max_motion: mean absolute change of luma between frames, in [0, 1]; 0.002 drops still pictures.
        min_sharpness: standard deviation of the Laplacian of luma, median over frames; below 0.01 all is blur.
        min_exposure, max_exposure: mean luma in [0, 1].
    """

    min_motion: float | None = None
    max_motion: float | None = None
    min_sharpness: float | None = None
    min_exposure: float | None = None
    max_exposure: float | None = None


def measure(frames: np.ndarray) -> dict[str, float]:
    """Return {"motion", "sharpness", "exposure"} of uint8 [T,H,W,3]; see FilterConfig for what they are."""
    import cv2

    scale = min(1.0, _SIDE / max(frames.shape[1:3]))
    size = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
    small = [
        cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for frame in frames
    ]
    luma = np.stack(small).astype(np.float32) / 255
    edges = [float(cv2.Laplacian(image, cv2.CV_32F).std()) for image in luma]
    motion = float(np.abs(np.diff(luma, axis=0)).mean(dtype=np.float64)) if len(luma) > 1 else 0.0
    return {"motion": motion, "sharpness": float(np.median(edges)), "exposure": float(luma.mean(dtype=np.float64))}


def decide(scores: Mapping[str, float], filters: FilterConfig) -> None:
    """Return nothing where a clip passes. Raises Filtered, named after the first score that misses its threshold."""
    for name, score in scores.items():
        low: float | None = getattr(filters, f"min_{name}", None)
        high: float | None = getattr(filters, f"max_{name}", None)
        if low is not None and score < low:
            raise Filtered(name, score, low)
        if high is not None and score > high:
            raise Filtered(name, score, high)


def score(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `scores` of the clip. Raises Filtered."""
    scores = measure(row["frames"])
    decide(scores, config.filters)
    return {"scores": scores}


STAGE = Stage("score", score, reads=("frames",), writes=("scores",))
