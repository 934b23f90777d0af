"""Bring depth and cameras of different programs into one unit.

Cameras from another program have their own unit. It is found from points that their motion triangulates: a factor for
z-depth, a factor and a shift for relative disparity, both fitted robustly, so that moving bodies do not count. The
remaining error is `camera_depth_error`, the weighted median of |log(depth / triangulated depth)|.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ex4d.depth import Geometry, bundle, cameras
from ex4d.errors import BadSample
from ex4d.geometry.camera import invert

STILL = 1e-4  # fraction of the median depth; the unit of cameras that move less cannot be found
MIN_POINTS = 32
NUM_ROUNDS = 10


def relative(result: Geometry) -> bool:
    """Return whether the depth is known only up to a scale and a shift."""
    return result.kind == "disparity" and not result.metric


def in_one_unit(result: Geometry, matches: bundle.Matches, focal: float | None) -> tuple[Geometry, float]:
    """Bring depth and cameras into one unit, of z-depth or else of the cameras: (geometry, `camera_depth_error`).

    Args:
        focal: focal length in px with which the cameras were found; None: that of `result.K`.
    """
    assert result.w2c is not None
    assert result.K is not None
    start = bundle.Bundle(result.w2c, focal or float(result.K[0, 0]), *np.ones((2, *matches.places.shape[:2])))
    solution = bundle.points_of(matches, start)
    known = cameras.known_points(solution) & (solution.inverse > 1e-6)
    moved = float(np.linalg.norm(invert(result.w2c)[:, :3, 3], axis=1).max())
    if moved == 0 or (moved * float(np.median(solution.inverse[known])) if known.any() else 0.0) < STILL:
        w2c = result.w2c.copy()
        w2c[:, :3, 3] = 0
        return replace(result, w2c=w2c), 0.0
    known &= measured(result, matches)
    if known.sum() < MIN_POINTS:
        raise BadSample("cameras_missing", "too few points can be triangulated to align cameras and depth")
    values = at_points(result.values, matches)[known]
    inverse, weight = solution.inverse[known], np.sqrt(solution.information[known])
    if relative(result):
        return _of_disparity(result, values, inverse, weight)
    logs = np.log((values if result.kind == "z_depth" else 1 / np.maximum(values, 1e-9)) * inverse)
    middle = weighted_median(logs, weight)
    w2c = result.w2c.copy()
    w2c[:, :3, 3] *= np.exp(middle)
    return replace(result, w2c=w2c), weighted_median(np.abs(logs - middle), weight)


def at_points(values: np.ndarray, matches: bundle.Matches) -> np.ndarray:
    """Sample values [T, H, W] at the points of the matches: [T, N]."""
    places = np.floor(matches.places + np.array(values.shape[:0:-1]) / 2).astype(int)
    return np.stack([one[at[:, 1], at[:, 0]] for one, at in zip(values, places, strict=True)])


def measured(result: Geometry, matches: bundle.Matches) -> np.ndarray:
    """Return bool [T, N]: points whose depth was measured rather than filled in."""
    if result.valid_mask is None:
        return np.ones(matches.places.shape[:2], bool)
    return at_points(result.valid_mask, matches)


def _of_disparity(
    result: Geometry, values: np.ndarray, inverse: np.ndarray, weight: np.ndarray
) -> tuple[Geometry, float]:
    """Fit 1/z = factor · disparity + shift robustly; return (geometry with z-depth in the cameras' unit, error)."""
    columns, robust = np.stack([values, np.ones_like(values)], axis=1).astype(np.float64), weight
    for _ in range(NUM_ROUNDS):
        root = np.sqrt(robust)
        factor, shift = np.linalg.lstsq(columns * root[:, None], inverse * root, rcond=None)[0]
        off = np.abs(columns @ (factor, shift) - inverse)
        robust = weight / np.maximum(off, 1e-3 * np.median(inverse))
    if factor <= 0:
        raise BadSample("cameras_missing", "the cameras contradict the depth: near and far are swapped")
    nearest = float(np.percentile(inverse, 1)) / 10  # limits what the fit puts beyond infinity
    z_depth = 1 / np.maximum(factor * result.values.astype(np.float64) + shift, nearest)
    error = weighted_median(np.abs(np.log(np.maximum(columns @ (factor, shift), nearest) / inverse)), weight)
    return replace(result, values=z_depth.astype(np.float32), kind="z_depth"), error


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the value at which half of the weight is reached."""
    order = np.argsort(values, kind="stable")
    running = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(running, 0.5 * running[-1])])
