"""Optical flow and the point tracks chained from it. DIS (Kroeger et al. 2016) in OpenCV, one thread, deterministic.

CoTracker3 can stand in for it (`ex4d.geometry.cotracker`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ex4d.errors import BadSample, ConfigError

METHODS = ("flow", "cotracker3")
Flows = dict[tuple[int, int], np.ndarray]
# On synthetic clips of 96 px these keep 96–99 % of the visible tracks within 2 px of the truth, 83 % without them.
MAX_ERROR_PX = 0.7  # forward–backward, at up to 358 px; beyond that in proportion to the size
MAX_SLOPE = 0.3  # px of flow per px
FINEST_PX = 256  # flow is found down to pictures of about this size
STEPS_PX = 128  # and where it is only the start of another search, to this one


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep OpenCV on one thread: a pipeline runs many clips at once, and bits must not depend on a pool."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def pair_flows(frames: np.ndarray, gaps: tuple[int, ...] = (1,), finest_px: int = FINEST_PX) -> Flows:
    """Return {(i, j): flow float32 [H, W, 2] px (x, y) from frame i to frame j} for every j = i ± gap.

    A wider pair starts from the chain of two narrower ones, since displacements over 10 px are lost when it is found
    alone: gaps are 1, 2, 4, …

    Args:
        frames: uint8 [T, H, W, 3].
        finest_px: side of the pictures that the search ends in.

    Raises:
        BadSample: flow_size, where a side is under 16 px, less than two of the method's patches.
    """
    import cv2

    if min(frames.shape[1:3]) < 16:
        raise BadSample("flow_size", f"{frames.shape[1:3]} is too small for optical flow, which needs 16 px")
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = _dis(frames.shape[1:3], finest_px)
    flows: Flows = {}
    with one_thread():
        for gap in gaps:
            for i in range(len(frames)):
                for j in (i - gap, i + gap):
                    if not 0 <= j < len(frames):
                        continue
                    start = np.zeros((*gray[i].shape, 2), np.float32)
                    if gap > 1:
                        middle = (i + j) // 2
                        start = flows[i, middle] + sample(flows[middle, j], flows[i, middle])
                    flows[i, j] = dis.calc(gray[i], gray[j], start)
    return flows


def _dis(size: tuple[int, ...], finest_px: int) -> Any:
    import cv2

    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # Down to the full size halves the preset's error at 96 px. At 512 px, half the size takes 0.27 of the time, and
    # 99.2 instead of 99.6 % of the kept tracks lie within 2 px of the truth; a quarter loses a fifth of the tracks.
    dis.setFinestScale(max(0, round(math.log2(min(size) / finest_px))))
    return dis


def sample(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Return `image` [H, W(, C)] read bilinearly at each pixel's place plus flow [H, W, 2] px; the border repeats."""
    import cv2

    x, y = _target(flow)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def consistency(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Return the forward–backward error float32 [H, W] in px, +inf where the flow leaves the picture."""
    height, width = forward.shape[:2]
    error = np.linalg.norm(forward + sample(backward, forward), axis=-1)
    x, y = _target(forward)
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    return np.where(inside, error, np.inf).astype(np.float32)


def _target(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = flow.shape[:2]
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]
    return x, y


def follow(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (flow float32 [T, H, W, 2] px from frame 0 to every frame, visible bool [T, H, W] in pixels of frame 0).

    Each flow is found from frame 0 itself, starting from the chain so far, so that errors do not add up. A pixel is
    visible where it stays in the picture, its flow and the flow back agree, and the flow does not tear around it: next
    to a depth edge flow follows whichever side has more texture.

    Args:
        frames: uint8 [T, H, W, 3].
    """
    import cv2

    num_frames, height, width = frames.shape[:3]
    limit = max(MAX_ERROR_PX, min(height, width) / 512)
    steps = pair_flows(frames, finest_px=STEPS_PX)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = _dis((height, width), FINEST_PX)
    there = np.zeros((num_frames, height, width, 2), np.float32)
    back = np.zeros((height, width, 2), np.float32)
    visible = np.ones((num_frames, height, width), bool)
    with one_thread():
        for t in range(1, num_frames):
            start = there[t - 1] + sample(steps[t - 1, t], there[t - 1])
            there[t] = dis.calc(gray[0], gray[t], start)
            back = dis.calc(gray[t], gray[0], steps[t, t - 1] + sample(back, steps[t, t - 1]))
            slopes = [cv2.Sobel(there[t], cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1))]
            steepest = np.max([np.linalg.norm(slope, axis=-1) for slope in slopes], axis=0)
            visible[t] = (consistency(there[t], back) <= limit) & (steepest <= MAX_SLOPE)
    return there, visible


def track(
    frames: np.ndarray,
    points: np.ndarray,
    dense: tuple[np.ndarray, np.ndarray] | None = None,
    method: str = "flow",
    folder: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return where points of the first frame go: (xy float32 [T, N, 2] px, visible bool [T, N]).

    Args:
        frames: uint8 [T, H, W, 3].
        points: float [N, 2] px (x, y) in frame 0, pixel centres at +0.5.
        dense: what `follow(frames)` gives, when it is at hand.
        method: one of METHODS.
        folder: of CoTracker3's code and weights (`cotracker.FETCH`).

    Raises:
        ConfigError: unknown method; code or weights that are missing.
        BadSample: flow_size.
    """
    if method not in METHODS:
        raise ConfigError("masks.tracker", method, f"one of {', '.join(METHODS)}")
    if method == "cotracker3":
        from ex4d.geometry import cotracker

        return cotracker.track(frames, points, folder)
    height, width = frames.shape[1:3]
    flow, seen = follow(frames) if dense is None else dense
    points = np.asarray(points, np.float32).reshape(-1, 2)
    inside = (points >= 0).all(axis=1) & (points < (width, height)).all(axis=1)
    column = np.clip(points[:, 0].astype(int), 0, width - 1)
    row = np.clip(points[:, 1].astype(int), 0, height - 1)
    return points + flow[:, row, column], seen[:, row, column] & inside
