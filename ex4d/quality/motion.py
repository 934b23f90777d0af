"""Score camera and object motion: one affine motion of the whole picture, and its residual."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.tracks import pair_flows
from ex4d.quality.pictures import gradient, luma, spread

PAIRS = 6
GAP_S = 0.1  # between the two frames of a pair: motion exceeds the flow's noise, and is small enough to be found
RESIDUAL_PX = 0.75  # on the small picture; three times the flow's median error
START_PX = 4.0  # allowance for what rotation and zoom add to the median motion
GRID = 4  # every fourth pixel is enough for six numbers


def motions(small: np.ndarray, fps: float) -> tuple[float, float]:
    """Return (camera_motion, object_motion), medians over pairs of frames; (0, 0) for a single frame.

    camera_motion: mean speed of the picture under the affine motion that explains most of its texture, in longer sides
    per second. object_motion: share of the texture, in [0, 1], whose motion differs by more than RESIDUAL_PX from it:
    moving bodies, and the parallax of near ones.

    Args:
        small: uint8 [T,h,w,3] RGB, longer side about 128.
        fps: frames per second.
    """
    gap = max(1, min(len(small) - 1, round(fps * GAP_S)))
    if len(small) < 2:
        return 0.0, 0.0
    pairs = [_pair(small[[first, first + gap]]) for first in spread(len(small) - gap, PAIRS)]
    speed, share = np.median(np.array(pairs), axis=0)
    return float(speed) * fps / gap / max(small.shape[1:3]), float(share)


def _pair(pair: np.ndarray) -> tuple[float, float]:
    """Return (mean length of the global motion in px, share of the texture that does not follow it) of two frames."""
    flow = pair_flows(pair)[0, 1][GRID // 2 :: GRID, GRID // 2 :: GRID].astype(np.float64)
    slope = np.hypot(*gradient(luma(pair[:1])[0]))[GRID // 2 :: GRID, GRID // 2 :: GRID]
    textured = slope >= max(1.0, float(np.median(slope)))
    if textured.sum() < 12:
        return 0.0, 0.0
    model = affine(flow, textured)
    residual = np.linalg.norm(flow - model, axis=-1)
    return float(np.linalg.norm(model, axis=-1).mean()), float((residual[textured] > RESIDUAL_PX).mean())


def affine(flow: np.ndarray, textured: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Fit an affine motion field float64 [h,w,2] to most of the flow, by reweighted least squares.

    Args:
        flow: float64 [h,w,2] px.
        textured: bool [h,w], where the flow is known.
    """
    height, width = flow.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    basis = np.stack([np.ones_like(x), 2 * x / width - 1, 2 * y / height - 1], axis=-1).astype(np.float64)
    middle = np.median(flow[textured], axis=0)  # a start that a body in less than half the picture does not bias
    weight = textured / (1 + np.square(np.linalg.norm(flow - middle, axis=-1) / START_PX))
    for _ in range(rounds):
        normal = np.einsum("hwi,hwj,hw->ij", basis, basis, weight) + 1e-9 * np.eye(3)
        target = np.einsum("hwi,hwc,hw->ic", basis, flow, weight)
        model = basis @ np.linalg.solve(normal, target)
        residual = np.linalg.norm(flow - model, axis=-1)
        weight = textured / (1 + np.square(residual / RESIDUAL_PX))
    return model
