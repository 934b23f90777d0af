"""Score a shot from the small frames of cut detection: black bars around the picture, and a logo in a corner.

Both need more frames than a clip has: a bar is black in all of them, a logo is static while the picture moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ex4d.quality.pictures import gradient

MAX_SAMPLES = 64
BLACK = 24.0  # luma of 255: above video black with its noise and rounding
LIT = 40.0  # a frame is used if its brightest parts are above this
STEP = 16.0  # the picture is brighter than the bar by this in most columns at the edge
MIN_BAR_LINES = 2
MIN_KEPT = 0.25  # bars that would leave less than this of a side are a dark picture, not bars
EDGE = 6.0  # least gradient of an edge, levels per pixel
STAYS = 0.75  # |mean gradient| / mean |gradient|: 1 for static edges
CORNER = 0.3  # of each side
MAX_RESTING = 0.12  # static share of the edges elsewhere; above it the camera is static and a logo cannot be told


@dataclass
class Samples:
    """Keep at most MAX_SAMPLES evenly spread frames of a shot of unknown length: every 2ⁿ-th, with n growing."""

    stride: int = 1
    frames: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def wants(self, index: int) -> bool:
        """Return whether frame `index` is one of the kept ones."""
        return index % self.stride == 0

    def add(self, index: int, grey: np.ndarray) -> None:
        """Add frame `index` (increasing), uint8 [h,w] luma, if it is one to keep."""
        if self.wants(index):
            self.frames.append((index, grey))
        while len(self.frames) > MAX_SAMPLES:
            self.stride *= 2
            self.frames = [(index, grey) for index, grey in self.frames if index % self.stride == 0]

    def take_until(self, cut: int) -> np.ndarray:
        """Return uint8 [K,h,w] of the frames before `cut`, and continue with those after it."""
        before = [grey for index, grey in self.frames if index < cut]
        self.frames, self.stride = [(index, grey) for index, grey in self.frames if index >= cut], 1
        return np.stack(before) if before else np.zeros((0, 1, 1), np.uint8)


def find_box(grey: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box (y, x, height, width) inside black bars, in px of the small frames; all of it without bars.

    A bar is a run of lines from the border that are black, except for a tenth of their pixels, in nearly every lit
    frame, and that ends at a straight edge: the picture begins there in most columns. So a dark sky is not a bar.

    Args:
        grey: uint8 [K,h,w] luma, K frames of one shot.
    """
    height, width = grey.shape[1:]
    lit = grey[np.percentile(grey, 99, axis=(1, 2)) > LIT] if len(grey) else grey
    if not len(lit):
        return 0, 0, height, width
    top, bottom = _bars(lit)
    left, right = _bars(lit[:, top : height - bottom].transpose(0, 2, 1))
    return top, left, height - top - bottom, width - left - right


def _bars(lit: np.ndarray) -> tuple[int, int]:
    """Return how many lines at the top and at the bottom of uint8 [K,h,w] are bars."""
    level = np.percentile(np.percentile(lit, 90, axis=2), 95, axis=0)
    black = level <= BLACK
    sides = ((black, lit), (black[::-1], lit[:, ::-1]))
    runs = [int(np.argmin(lines)) for lines, _ in sides]  # also 0 if all are black
    first, last = (run if _ends_straight(run, *side) else 0 for run, side in zip(runs, sides, strict=True))
    count = max(first, last)
    if first != last and _ends_straight(count, *sides[0 if last == count else 1]):
        first = last = count  # bars come in pairs of equal height; a subtitle may hide one edge
    return (first, last) if len(level) - first - last >= MIN_KEPT * len(level) else (0, 0)


def _ends_straight(count: int, black: np.ndarray, lit: np.ndarray) -> bool:
    """Return whether the picture begins after `count` lines: black before, brighter in most of the columns there."""
    if count < MIN_BAR_LINES or not black[count - MIN_BAR_LINES : count].all():
        return False
    bar = float(np.percentile(lit[:, count - MIN_BAR_LINES : count], 95))
    inside = lit[:, count : count + 4].max(axis=(0, 1)).astype(np.float32)
    return bool((inside > bar + STEP).mean() > 0.5)


def source_box(box: Sequence[int], small: Sequence[int], size: Sequence[int]) -> list[int]:
    """Convert a box of the small frames to px of the source, one small line further in: its edge is blurred.

    Args:
        box: (y, x, height, width) of `find_box`.
        small: (h, w) of the small frames.
        size: (H, W) of the source, upright.
    """
    boxes: list[list[int]] = []
    for start, length, lines, pixels in zip(box[:2], box[2:], small, size, strict=True):
        first = 0 if start == 0 else -(-(start + 1) * pixels // lines)
        stop = pixels if start + length == lines else (start + length - 1) * pixels // lines
        boxes.append([first, stop - first])
    return [boxes[0][0], boxes[1][0], boxes[0][1], boxes[1][1]]


def logo_share(grey: np.ndarray, box: Sequence[int]) -> float:
    """Return the share of a corner, in [0, 1], under edges that are static while the rest moves.

    The gradient averaged over time keeps its length at static edges and loses it where the picture moves. The score is
    that of the most covered corner, scaled down to 0 as the share of static edges elsewhere approaches MAX_RESTING:
    with a static camera, a logo cannot be told from the scene.

    Args:
        grey: uint8 [K,h,w] luma, frames spread over the shot.
        box: (y, x, height, width) inside bars.
    """
    import cv2

    y, x, height, width = box
    if len(grey) < 8 or min(height, width) < 16:
        return 0.0
    slopes = np.stack([gradient(image) for image in grey[:, y : y + height, x : x + width]])
    mean, length = np.hypot(*slopes.mean(axis=0)), np.hypot(slopes[:, 0], slopes[:, 1]).mean(axis=0)
    stays = (mean > EDGE) & (mean > STAYS * length)
    rows, columns = round(CORNER * height), round(CORNER * width)
    corner = np.zeros((height, width), bool)
    shares = []
    for ys in (slice(0, rows), slice(height - rows, height)):
        for xs in (slice(0, columns), slice(width - columns, width)):
            corner[ys, xs] = True
            closed = cv2.morphologyEx(stays[ys, xs].astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
            shares.append(float(closed.mean()))
    edges = ~corner & (length > EDGE)
    resting = float(stays[edges].mean()) if edges.any() else 1.0
    return max(shares) * float(np.clip((MAX_RESTING - resting) / MAX_RESTING, 0.0, 1.0))
