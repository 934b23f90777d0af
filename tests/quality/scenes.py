"""Small synthetic clips whose truth is known: a panning texture with bodies, text, bars or logos on it."""

from __future__ import annotations

import cv2
import numpy as np


def texture(size=(144, 256), seed=0, grain=6.0):
    """Return float [H,W] in [0, 255]: smooth noise of about `grain` px, full contrast."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal(size), (0, 0), grain / 2)
    return np.clip(128 + 45 * noise / noise.std(), 30, 225)


def pan(num_frames=24, size=(144, 256), step=(2.0, 1.0), seed=0, noise=2.0):
    """Return uint8 [T,H,W,3]: a window that moves over a texture by `step` (x, y) px a frame, with sensor noise."""
    height, width = size
    reach = int(np.ceil(num_frames * max(abs(step[0]), abs(step[1])))) + 2
    world = texture((height + reach, width + reach), seed).astype(np.float32)
    rng = np.random.default_rng(seed + 1)
    frames = []
    for t in range(num_frames):
        shift = np.float32([[1, 0, -t * step[0]], [0, 1, -t * step[1]]])
        view = cv2.warpAffine(world, shift, (width, height), flags=cv2.INTER_LINEAR)
        view = view + rng.normal(0, noise, view.shape)
        frames.append(np.clip(view, 0, 255).astype(np.uint8))
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def written(frames, text="Nobody saw what came next", where=0.9, height=0.07, colour=(255, 255, 255)):
    """Return the frames with a line of text at a share `where` of the height, letters `height` of it, dark rims."""
    H, W = frames.shape[1:3]
    scale = height * H / 22
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
    at = (max(2, (W - width) // 2), int(where * H))
    out = frames.copy()
    for frame in out:
        cv2.putText(frame, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(frame, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
    return out


def barred(frames, top=0, bottom=0, left=0, right=0):
    """Return the frames with black bars laid over them, a video's black with its noise."""
    out = frames.copy()
    rng = np.random.default_rng(5)
    mask = np.ones(frames.shape[1:3], bool)
    mask[top : frames.shape[1] - bottom, left : frames.shape[2] - right] = False
    out[:, mask] = rng.integers(0, 6, (len(frames), int(mask.sum()), 1), dtype=np.uint8)
    return out


def grey(frames):
    """Return uint8 [T,H,W] luma."""
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
