"""Find overlaid text without a network: thin, static strokes that form lines."""

from __future__ import annotations

import numpy as np

STROKE_PX = 5  # strokes are thinner than this at 256 px
CONTRAST = 40  # of 255: contrast of a stroke to its surroundings
STAYS = 0.75  # share of the sampled frames in which a stroke is present
STEADY_LEVELS = 14.0  # standard deviation over time of a stroke's brightness
RISES = 1.2  # strokes per line height; letters have about two, scene edges less than one


def text_share(grey: np.ndarray) -> float:
    """Return the share of the picture, in [0, 1], under boxes around lines of overlaid text.

    A line is a row of strokes thinner than STROKE_PX, all brighter or all darker than their surroundings and
    static, at least as wide as three letters, with a letter-like density of strokes. Writing in the scene counts while
    the camera is static. Not found: text that appears late or scrolls, letters over 0.2 of the height, low contrast.

    Args:
        grey: uint8 [K,h,w] luma of frames spread over the clip, longer side about 256.
    """
    import cv2

    boxes = np.zeros(grey.shape[1:], bool)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (STROKE_PX, STROKE_PX))
    steady = grey.std(axis=0) <= STEADY_LEVELS
    for operation in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
        stands_out = np.stack([cv2.morphologyEx(image, operation, kernel) for image in grey])
        strokes = ((stands_out >= CONTRAST).mean(axis=0) >= STAYS) & steady
        boxes |= _lines(strokes)
    return float(boxes.mean())


def _lines(strokes: np.ndarray) -> np.ndarray:
    """Return bool [h,w], True in the boxes around strokes that form a line of text."""
    import cv2

    height, width = strokes.shape
    joined = cv2.morphologyEx(strokes.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 13), np.uint8))
    joined = cv2.morphologyEx(joined, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    lines = np.zeros((height, width), bool)
    for label, (x, y, w, h, _) in enumerate(stats):
        box = (slice(y, y + h), slice(x, x + w))
        if label and _is_line(strokes[box] & (labels[box] == label), height):
            lines[box] = True
    return lines


def _is_line(strokes: np.ndarray, height: int) -> bool:
    h, w = strokes.shape
    if not 4 <= h <= 0.2 * height or w < 2.2 * h:
        return False
    fill = strokes.mean()
    if not 0.12 <= fill <= 0.75:
        return False
    rises = (strokes[:, 1:] & ~strokes[:, :-1]).sum(axis=1)
    return bool(np.percentile(rises, 75) >= RISES * w / h)
