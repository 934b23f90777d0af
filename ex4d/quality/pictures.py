"""Scale frames down for scoring, so that a threshold means the same at any clip size."""

from __future__ import annotations

import numpy as np

MIN_SIDE = 16  # optical flow needs two of its patches


def shrink(frames: np.ndarray, longer_side: int) -> np.ndarray:
    """Scale uint8 [T,H,W,3] or [T,H,W] down to a longer side of at most `longer_side` px, by the area filter."""
    import cv2

    height, width = frames.shape[1:3]
    scale = min(1.0, longer_side / max(height, width))
    size = (max(MIN_SIDE, round(width * scale)), max(MIN_SIDE, round(height * scale)))
    if scale == 1.0 and min(height, width) >= MIN_SIDE:
        return frames
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def luma(frames: np.ndarray) -> np.ndarray:
    """Return BT.601 luma uint8 [T,H,W] of uint8 [T,H,W,3] RGB."""
    import cv2

    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` positions of `count`, evenly spread, the same on every run."""
    number = min(count, limit)
    return [(2 * index + 1) * count // (2 * number) for index in range(number)]


def gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (d/dx, d/dy), float32 [H,W], of luma in [0, 255], in levels per pixel (Sobel)."""
    import cv2

    image = image.astype(np.float32)
    return cv2.Sobel(image, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(image, cv2.CV_32F, 0, 1, scale=1 / 8)
