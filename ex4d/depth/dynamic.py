"""Find what moves in a clip with known depth and cameras: optical flow that these do not explain."""

from __future__ import annotations

import numpy as np

from ex4d.depth import moving, parallax
from ex4d.errors import Filtered
from ex4d.geometry.tracks import one_thread, pair_flows, trust

GAPS = (1, 2, 4)


def of_flow(frames: np.ndarray, z_depth: np.ndarray, K: np.ndarray, w2c: np.ndarray | None) -> np.ndarray:
    """Return dynamic_mask bool [T, H, W], True where the surface moves in the world.

    If more than `moving.MAX_MOVING` of the clip seems to move, all is True: nothing is then known to be static.

    Args:
        frames: uint8 [T, H, W, 3]. z_depth: float32 [T, H, W]. K: [3, 3] px, its principal point taken as the centre.
        w2c: [T, 4, 4] in the unit of z_depth; None: the camera is assumed not to move.
    """
    if len(frames) == 1:
        return np.zeros(z_depth.shape, bool)
    cameras = np.tile(np.eye(4), (len(frames), 1, 1)) if w2c is None else w2c
    inverse = (1 / np.maximum(z_depth, 1e-6)).astype(np.float32)
    with one_thread():
        flows = pair_flows(frames, GAPS)
        weights = trust(flows)
        rigid = parallax.induced(inverse, cameras, float(K[0, 0]), flows)
        off, total = np.zeros((2, *z_depth.shape), np.float32)
        for (i, j), flow in flows.items():
            off[i] += weights[i, j] * np.linalg.norm(flow - rigid[i, j], axis=-1)
            total[i] += weights[i, j]
        try:
            return moving.find(inverse, off / np.maximum(total, 1e-3), flows, weights)
        except Filtered:
            return np.ones(z_depth.shape, bool)
