"""Build conditions with simulated errors of estimated depth, as they occur in generation (docs/method.md, 4)."""

from __future__ import annotations

import numpy as np

from ex4d.errors import BadSample
from ex4d.geometry.camera import Camera
from ex4d.geometry.mesh import build
from ex4d.geometry.render import render
from ex4d.geometry.visibility import landing, visibility

CELLS = 8  # cells per side of the distortion grid


def degrade(z_depth: np.ndarray, rng: np.random.Generator, jitter: float = 0.04, blur_px: float = 6.0) -> np.ndarray:
    """Degrade z_depth float32 [T, H, W] as depth estimation does: by a smooth distortion and smeared edges.

    Args:
        z_depth: float32 [T, H, W], positive.
        rng: draws one distortion for the whole clip, so that it does not flicker.
        jitter: standard deviation of the distortion, as a fraction of the disparity.
        blur_px: standard deviation, in px at 512, of the disparity's blur, which creates points between near and far.
    """
    import cv2

    height, width = z_depth.shape[1:]
    cells = rng.normal(0, jitter, (CELLS, CELLS)).astype(np.float32)
    field = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    sigma = blur_px * min(height, width) / 512
    disparity = np.exp(field) / z_depth
    if sigma > 0:
        disparity = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in disparity])
    return (1 / disparity).astype(np.float32)


def condition(
    frames: np.ndarray,
    z_depth: np.ndarray,
    K: np.ndarray,
    w2c: np.ndarray,
    seed: int,
    jitter: float = 0.04,
    blur_px: float = 6.0,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (cond_video uint8 [T, H, W, 3], visible bool [T, H, W]) in the source's pixels; the first frame is clean.

    Each frame's degraded mesh is rendered from the novel camera and sampled where the frame's true points land. Colours
    are displaced and torn as in a real warp, while the training target stays the clean video.

    Args:
        frames: uint8 [T, H, W, 3].
        z_depth: float32 [T, H, W], finite and positive.
        K: float64 [3, 3] px.
        w2c: float64 [T, 4, 4], each relative to its frame's own camera (`MaskSet.w2c`).
        jitter, blur_px: see `degrade`; 0 and 0 give the plain visibility condition, resampled once.
        valid: bool [T, H, W], True where depth is known; None: everywhere.

    Raises:
        BadSample: depth_shape, and what `mesh.build` raises.
    """
    import cv2

    if frames.shape[:3] != z_depth.shape or len(w2c) != len(frames):
        raise BadSample("depth_shape", f"frames {list(frames.shape)}, depth {list(z_depth.shape)}, {len(w2c)} poses")
    wrong = degrade(np.ascontiguousarray(z_depth, np.float32), np.random.default_rng([seed, CELLS]), jitter, blur_px)
    cond_video, visible = np.zeros_like(frames), np.zeros(z_depth.shape, bool)
    cond_video[0], visible[0] = frames[0], True
    for t in range(1, len(frames)):
        known = None if valid is None else valid[t]
        novel = render(build(frames[t], wrong[t], K, valid=known), Camera(K, w2c[t], wrong[t].shape), backend="cpu")
        u, v, _ = landing(z_depth[t], K, w2c[t])
        at = (u.astype(np.float32) - 0.5, v.astype(np.float32) - 0.5)
        weight = cv2.remap(novel.visible_mask.astype(np.float32), *at, cv2.INTER_LINEAR)  # 0 outside the picture
        colour = cv2.remap(novel.colour.astype(np.float32), *at, cv2.INTER_LINEAR) / np.maximum(weight, 1e-6)[..., None]
        visible[t] = visibility(z_depth[t], build(frames[t], z_depth[t], K), w2c[t]) & (weight > 0.5)
        if known is not None:
            visible[t] &= known
        cond_video[t] = np.where(visible[t][..., None], np.clip(np.rint(colour), 0, 255), 0).astype(np.uint8)
    return cond_video, visible
