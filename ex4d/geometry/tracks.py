"""Optical flow and point tracks from it: DIS (Kroeger et al. 2016) in OpenCV, single-threaded, deterministic.

CoTracker3 can track points instead (`ex4d.geometry.cotracker`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ex4d.errors import BadSample, ConfigError

COTRACKER3 = "cotracker3"
METHODS = ("flow", COTRACKER3)
Flows = dict[tuple[int, int], np.ndarray]
# With these limits, 96–99 % of the visible tracks of synthetic 96 px clips are within 2 px of the truth; without, 83 %.
MAX_ERROR_PX = 0.7  # forward–backward error at up to 358 px; for larger sizes, in proportion to the size
MAX_SLOPE = 0.3  # px of flow per px
FINEST_PX = 256  # the finest level of the flow search has about this size
BACK_PX = 128  # the same for a flow that only validates another
COARSE = 1.7  # error of a flow searched to BACK_PX, relative to FINEST_PX
# Iterations of gradient descent and of refinement when tracking: a quarter and two fifths of the preset's, which keep
# as many tracks within 2 px.
NUM_STEPS = (6, 2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit OpenCV to one thread: a pipeline runs many clips at once, and results must not depend on a pool."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def pair_flows(frames: np.ndarray, gaps: tuple[int, ...] = (1,)) -> Flows:
    """Return {(i, j): flow float32 [H, W, 2] px (x, y) from frame i to frame j} for every j = i ± gap.

    The search for a wide gap starts from two chained flows of half the gap, because it would otherwise lose
    displacements over 10 px. So gaps must be 1, 2, 4, …

    Args:
        frames: uint8 [T, H, W, 3].

    Raises:
        BadSample: flow_size, if a side is under 16 px, less than two of the method's patches.
    """
    import cv2

    _check_size(frames.shape[1:3])
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = _dis(frames.shape[1:3], FINEST_PX)
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


def measure_again(frames: np.ndarray, starts: Flows) -> Flows:
    """Refine flows: warp each target frame by `starts`, measure the residual flow and add it. Result as `pair_flows`.

    The search finds 97 to 99 % of a displacement, so after a good start little of the residual is missed.

    Args:
        frames: uint8 [T, H, W, 3].
        starts: {(i, j): flow float32 [H, W, 2] px} close to the true flow; it need not be smooth.
    """
    import cv2

    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis, none = _dis(frames.shape[1:3], FINEST_PX), np.zeros((*frames.shape[1:3], 2), np.float32)
    flows: Flows = {}
    with one_thread():
        for (i, j), start in starts.items():
            left = dis.calc(gray[i], sample(gray[j], start), none)
            flows[i, j] = left + sample(start, left)
    return flows


def trust(flows: Flows) -> Flows:
    """Weight flows by their forward–backward error: float32 [H, W], 0 to 1; each pair needs its reverse in `flows`."""
    return {pair: np.exp(-np.square(consistency(flows[pair], flows[pair[::-1]]))) for pair in flows}


def _dis(size: tuple[int, ...], finest_px: int, num_steps: tuple[int, int] | None = None) -> Any:
    """Return a DIS search whose finest level is about `finest_px`; `num_steps`: see NUM_STEPS; None: 25 and 5."""
    import cv2

    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # A search down to full size halves the preset's error at 96 px. At 512 px, stopping at half the size takes 0.27 of
    # the time, and 99.2 instead of 99.6 % of the kept tracks are within 2 px; at a quarter, a fifth of them are lost.
    dis.setFinestScale(max(0, round(math.log2(min(size) / finest_px))))
    if num_steps is not None:
        dis.setGradientDescentIterations(num_steps[0])
        dis.setVariationalRefinementIterations(num_steps[1])
    return dis


def sample(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Sample `image` [H, W(, C)] bilinearly at each pixel's position plus flow [H, W, 2] px; the border is repeated."""
    import cv2

    x, y = _target(flow)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def consistency(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Return the forward–backward error float32 [H, W] in px, +inf where the flow leaves the picture."""
    height, width = forward.shape[:2]
    left = forward + sample(backward, forward)
    # np.linalg.norm along a short axis takes several times longer.
    error = np.sqrt(left[..., 0] ** 2 + left[..., 1] ** 2)
    x, y = _target(forward)
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    return np.where(inside, error, np.inf).astype(np.float32)


def _target(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = flow.shape[:2]
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]
    return x, y


def follow(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (flow float32 [T, h, w, 2] px of `frames` from frame 0 to every frame, visible bool [T, h, w]).

    Frames whose shorter side is a multiple n of FINEST_PX are tracked at 1/n of their size, so h, w are H/n, W/n;
    a larger size does not improve the tracks. Each flow is measured from frame 0, so that errors do not accumulate; its
    search starts from the extrapolated motion. A pixel is visible if it stays in the picture, its forward and backward
    flow agree, and the flow is smooth around it: next to a depth edge, flow follows whichever side has more texture.

    Args:
        frames: uint8 [T, H, W, 3].
    """
    import cv2

    ratio = max(1, round(min(frames.shape[1:3]) / FINEST_PX))
    num_frames, height, width = len(frames), frames.shape[1] // ratio, frames.shape[2] // ratio
    _check_size((height, width))
    forth, home = _dis((height, width), FINEST_PX, NUM_STEPS), _dis((height, width), BACK_PX, NUM_STEPS)
    limit = max(MAX_ERROR_PX, ratio * min(height, width) / 512) / ratio
    limit *= COARSE if home.getFinestScale() > forth.getFinestScale() else 1
    there = np.zeros((num_frames, height, width, 2), np.float32)
    back, before = np.zeros((2, height, width, 2), np.float32)
    visible = np.ones((num_frames, height, width), bool)
    with one_thread():
        gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        if ratio > 1:
            gray = [cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) for image in gray]
        for t in range(1, num_frames):
            # Flow is arbitrary where the search finds nothing, so its extrapolation is clipped to the picture's width.
            start, back_start = np.clip([2 * there[t - 1] - there[max(0, t - 2)], 2 * back - before], -width, width)
            there[t] = forth.calc(gray[0], gray[t], start)
            back, before = home.calc(gray[t], gray[0], back_start), back
            slopes = [cv2.Sobel(there[t], cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1))]
            steepest = np.maximum(*(slope[..., 0] ** 2 + slope[..., 1] ** 2 for slope in slopes))
            visible[t] = (consistency(there[t], back) <= limit) & (steepest <= MAX_SLOPE**2)
    return there * np.float32(ratio), visible


def _check_size(size: tuple[int, ...]) -> None:
    if min(size) < 16:
        raise BadSample("flow_size", f"{size} is too small for optical flow, which needs 16 px")


def track(
    frames: np.ndarray,
    points: np.ndarray,
    dense: tuple[np.ndarray, np.ndarray] | None = None,
    method: str = "flow",
    folder: str | None = None,
    device: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Track points of the first frame; return (xy float32 [T, N, 2] px, visible bool [T, N]).

    Args:
        frames: uint8 [T, H, W, 3].
        points: float [N, 2] px (x, y) in frame 0, pixel centres at +0.5.
        dense: result of `follow(frames)`; None: computed here.
        method: one of METHODS.
        folder, device: of CoTracker3 (`cotracker.track`).

    Raises:
        ConfigError: unknown method; missing code or weights.
        BadSample: flow_size.
    """
    if method not in METHODS:
        raise ConfigError("masks.tracker", method, f"one of {', '.join(METHODS)}")
    if method == COTRACKER3:
        from ex4d.geometry import cotracker

        return cotracker.track(frames, points, folder, device)
    import cv2

    height, width = frames.shape[1:3]
    flow, seen = follow(frames) if dense is None else dense
    points = np.asarray(points, np.float32).reshape(-1, 2)
    inside = (points >= 0).all(axis=1) & (points < (width, height)).all(axis=1)
    scale = np.array([flow.shape[2] / width, flow.shape[1] / height], np.float32)
    column, row = np.clip((points * scale).astype(int), 0, (flow.shape[2] - 1, flow.shape[1] - 1)).T
    if flow.shape[1:3] == (height, width):
        return points + flow[:, row, column], seen[:, row, column] & inside
    x, y = ((points * scale)[None] - np.float32(0.5)).transpose(2, 0, 1)
    moved = [cv2.remap(there, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0] for there in flow]
    return points + np.stack(moved), seen[:, row, column] & inside
