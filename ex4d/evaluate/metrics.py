"""Compute image metrics on uint8 frames, optionally under a mask; NaN for an empty mask."""

from __future__ import annotations

import cv2
import numpy as np

PSNR_CAP_DB = 100.0  # for identical pixels: keeps means finite


def psnr(frames: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB over all pixels, or over those of `mask`.

    Args:
        frames, truth: uint8 [..., H, W, 3], equal shapes.
        mask: bool [..., H, W], True where a pixel counts.

    Returns:
        10 log10(255² / mean squared error), at most PSNR_CAP_DB; NaN if the mask is empty.
    """
    if frames.shape != truth.shape:
        raise ValueError(f"shapes differ: {frames.shape} and {truth.shape}")
    squared = (frames.astype(np.float64) - truth.astype(np.float64)) ** 2
    if mask is not None:
        if not mask.any():
            return float("nan")
        squared = squared[mask]
    error = float(squared.mean())
    if error == 0.0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10.0 * float(np.log10(255.0**2 / error)))


def ssim(frame: np.ndarray, truth: np.ndarray) -> float:
    """Return the structural similarity of two uint8 [H, W, 3] pictures, in [-1, 1], mean over pixels and channels.

    Gaussian window 11×11, sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004).
    """
    a, b = frame.astype(np.float64), truth.astype(np.float64)

    def blur(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (11, 11), 1.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    inner = score[5:-5, 5:-5] if min(score.shape[:2]) > 10 else score
    return float(inner.mean())


def inpaint(cond_video: np.ndarray, visible: np.ndarray, radius_px: float = 3.0) -> np.ndarray:
    """Fill the holes of the condition with Telea's fast marching method: the baseline without a network.

    Args:
        cond_video: uint8 [T, H, W, 3]; visible: bool [T, H, W].
    """
    holes = (~visible).astype(np.uint8)
    return np.stack(
        [
            cv2.inpaint(np.ascontiguousarray(f), h, radius_px, cv2.INPAINT_TELEA)
            for f, h in zip(cond_video, holes, strict=True)
        ]
    )
