"""Scores of a clip from its frames: one pass over small copies of them."""

from __future__ import annotations

import numpy as np

from ex4d.quality.motion import motions
from ex4d.quality.overlay import text_share
from ex4d.quality.pictures import gradient, luma, shrink, spread

SIDE, TEXT_SIDE = 128, 256
SHARP_FRAMES = 7
TEXTURE_LEVELS = 2.0  # of 255 per pixel: above the noise of a flat wall, below its plaster
REPEAT_LEVELS = 1.0  # of 255: largest change of an 8 × 8 block in a P frame without new content


def measure(frames: np.ndarray, fps: float) -> dict[str, float]:
    """Measure a clip; return {name of SCORES: score}.

    Args:
        frames: uint8 [T,H,W,3] RGB, T at least 1.
        fps: frames per second.
    """
    medium = shrink(frames, TEXT_SIDE)
    small = shrink(medium, SIDE)
    grey = luma(small)
    scaled = grey.astype(np.float32) / 255
    change = np.abs(np.diff(scaled, axis=0))
    camera, objects = motions(small, fps)
    few = grey[spread(len(grey), SHARP_FRAMES)]
    return {
        "motion": float(change.mean(dtype=np.float64)) if len(change) else 0.0,
        "camera_motion": camera,
        "object_motion": objects,
        "sharpness": float(np.median([sharpness(frame) for frame in luma(frames[spread(len(frames), SHARP_FRAMES)])])),
        "exposure": float(scaled.mean(dtype=np.float64)),
        "still": still_share(grey),
        "texture": float(np.mean([(np.hypot(*gradient(image)) >= TEXTURE_LEVELS).mean() for image in few])),
        "text": text_share(luma(medium[spread(len(medium), 8)])),
    }


def sharpness(image: np.ndarray) -> float:
    """Return the share of the gradient that a blur over 9 pixels removes, in [0, 1]; 0 for a flat picture.

    A blurred picture loses little. Contrast and exposure cancel out (Crete et al., "The blur
    effect", SPIE 2007; 1 − their score).

    Args:
        image: uint8 [H,W] luma at the clip's own size, because scaling down hides blur.
    """
    import cv2

    picture = image.astype(np.float32)
    shares = []
    for axis, kernel in ((0, (1, 9)), (1, (9, 1))):
        blurred = cv2.blur(picture, kernel, borderType=cv2.BORDER_REPLICATE)
        before, after = np.abs(np.diff(picture, axis=axis)), np.abs(np.diff(blurred, axis=axis))
        total = float(before.sum(dtype=np.float64))
        lost = float(np.maximum(before - after, 0).sum(dtype=np.float64))
        shares.append(lost / total if total > 0.05 * picture.size else 0.0)
    return min(shares)


def still_share(grey: np.ndarray) -> float:
    """Return the share of frames, without the first, that repeat the one before: no block of 8 × 8 px changes.

    Near 0 for video, even from a static camera, because its noise changes; 0.2 for 24 frames per second shown at 30;
    near 1 for a slide show.

    Args:
        grey: uint8 [T,h,w] luma.
    """
    if len(grey) < 2:
        return 0.0
    height, width = (side // 8 * 8 for side in grey.shape[1:])
    change = np.abs(np.diff(grey[:, :height, :width].astype(np.int16), axis=0))
    blocks = change.reshape(len(change), height // 8, 8, width // 8, 8).mean(axis=(2, 4))
    return float((blocks.max(axis=(1, 2)) <= REPEAT_LEVELS).mean())
