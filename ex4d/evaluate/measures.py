"""Measure a generated video against the true novel view, if that is known, and against the requested camera path.

Frame 0, which is an input of the model, is left out. A figure is None if there is nothing to measure: a clip without
holes, a view without known truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ex4d.evaluate.camera_error import NEAR_DEG, camera_error
from ex4d.evaluate.metrics import psnr, ssim
from ex4d.evaluate.views import View

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Measure:
    """One figure: its column title, and its number of digits."""

    label: str
    digits: int


MEASURES = {
    "psnr": Measure("PSNR, dB", 2),
    "psnr_holes": Measure("PSNR in the holes", 2),
    "psnr_pasted": Measure("PSNR, seen pixels pasted", 2),
    "ssim": Measure("SSIM", 3),
    "psnr_seen": Measure("PSNR, seen pixels to warp", 2),
    "cameras_near": Measure(f"cameras within {NEAR_DEG:g}°, %", 0),
    "cameras_found": Measure("cameras found, %", 0),
    "rotation_deg": Measure("of those found: error, °", 2),
    "translation": Measure("error, % of the radius", 2),
    "flow_px": Measure("points off, px", 2),
}
NOTHING: Figures = dict.fromkeys(MEASURES)
PERCENT = ("translation", "cameras_near", "cameras_found")


def measure(view: View, frames: np.ndarray, seen: np.ndarray) -> Figures:
    """Return {key of MEASURES: figure} of a generated video.

    Args:
        frames: uint8 [T, H, W, 3], a method's result.
        seen: bool [T, H, W], the eroded mask of the condition that the method received; False in holes.
    """
    generated, condition = frames[1:], view.cond_video[1:]
    figures: Figures = {
        "psnr_seen": _known(psnr(generated, condition, seen[1:])),
        **camera_error(view, frames).summary(),
    }
    if view.truth is None:
        return {name: figures.get(name) for name in MEASURES}
    truth = view.truth[1:]
    pasted = np.where(seen[1:, ..., None], condition, generated)
    figures["psnr"] = _known(psnr(generated, truth))
    figures["psnr_holes"] = _known(psnr(generated, truth, ~seen[1:]))
    figures["psnr_pasted"] = _known(psnr(pasted, truth))
    figures["ssim"] = float(np.mean([ssim(*pair) for pair in zip(generated, truth, strict=True)]))
    return {name: figures.get(name) for name in MEASURES}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
