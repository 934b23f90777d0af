"""Measure the error of estimated depth up to scale and shift."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.depth import align_scale_shift


def abs_rel(z_depth: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean of |z − truth| / truth after fitting one scale >= 0 and shift to the clip's disparity.

    Args:
        z_depth, truth: [T, H, W] > 0.
    """
    scale, shift = align_scale_shift(1 / z_depth, 1 / truth, positive_scale=False)
    if scale < 0:  # near and far are swapped: no better than a constant
        scale, shift = 0.0, float(np.mean(1 / truth))
    aligned = 1 / np.maximum(scale / z_depth + shift, 0.5 / truth.max())
    return float(np.mean(np.abs(aligned - truth) / truth))


def abs_rel_of_constant(truth: np.ndarray) -> float:
    """Return the same error for the best constant depth: the median weighted by 1 / truth."""
    values = np.sort(truth, axis=None)
    weight = np.cumsum(1 / values.astype(np.float64))
    constant = values[np.searchsorted(weight, weight[-1] / 2)]
    return float(np.mean(np.abs(constant - truth) / truth))
