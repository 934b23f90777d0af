"""Optical flow and the point tracks chained from it. DIS (Kroeger et al. 2016) in OpenCV, one thread, deterministic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ex4d.errors import BadSample

Flows = dict[tuple[int, int], np.ndarray]


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


def pair_flows(frames: np.ndarray, gaps: tuple[int, ...] = (1,)) -> Flows:
    """Return {(i, j): flow float32 [H, W, 2] px (x, y) from frame i to frame j} for every j = i ± gap.

    A wider pair starts from the chain of two narrower ones, since displacements over 10 px are lost when it is found
    alone: gaps are 1, 2, 4, …

    Args:
        frames: uint8 [T, H, W, 3].

    Raises:
        BadSample: flow_size, where a side is under 16 px, less than two of the method's patches.
    """
    import cv2

    if min(frames.shape[1:3]) < 16:
        raise BadSample("flow_size", f"{frames.shape[1:3]} is too small for optical flow, which needs 16 px")
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)  # halves the error of the preset at 96 px
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


def track(
    frames: np.ndarray, points: np.ndarray, max_error_px: float | None = None, flows: Flows | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return where points of the first frame go: (xy float32 [T, N, 2] px, visible bool [T, N]).

    A point is lost for good where its flow and the flow back disagree (it is covered, or leaves the picture).

    Args:
        frames: uint8 [T, H, W, 3].
        points: float [N, 2] px (x, y) in frame 0, pixel centres at +0.5.
        max_error_px: largest forward–backward error of a step; None: 1 px at 512 px, in proportion, at least 0.5.
        flows: what `pair_flows(frames)` gives, when it is at hand.
    """
    import cv2

    num_frames, height, width = frames.shape[:3]
    limit = max(0.5, min(height, width) / 512) if max_error_px is None else max_error_px
    flows = pair_flows(frames) if flows is None else flows
    xy = np.empty((num_frames, len(points), 2), np.float32)
    visible = np.empty((num_frames, len(points)), bool)
    xy[0] = points
    visible[0] = (xy[0] >= 0).all(axis=1) & (xy[0] < (width, height)).all(axis=1)
    with one_thread():
        for t in range(1, num_frames):
            forward = flows[t - 1, t]
            step = np.concatenate([forward, consistency(forward, flows[t, t - 1])[..., None]], axis=-1)
            step[~np.isfinite(step)] = 1e3
            at = (xy[t - 1] - 0.5)[None]
            found = cv2.remap(step, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]
            xy[t] = xy[t - 1] + found[:, :2]
            inside = (xy[t] >= 0).all(axis=1) & (xy[t] < (width, height)).all(axis=1)
            visible[t] = visible[t - 1] & inside & (found[:, 2] <= limit)
    return xy, visible
