"""Random depth, colours and cameras for the tests of the mesh and its renderers."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from ex4d.geometry.camera import Camera, intrinsics, look_at


def random_scene(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (frame uint8 [H, W, 3], z_depth float32 [H, W]): a wavy background with discs in front of it."""
    rng = np.random.default_rng([seed, 1])
    height, width = size
    waves = gaussian_filter(rng.standard_normal(size), height / 10)
    z_depth = 4 + 1.5 * waves / np.abs(waves).max()
    row, column = np.mgrid[:height, :width]
    for _ in range(5):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.05, 0.25) * height
        slope = rng.uniform(-0.5, 0.5)
        disc = rng.uniform(1.5, 3) + slope * (column - x) / width
        z_depth = np.where((row - y) ** 2 + (column - x) ** 2 < radius**2, disc, z_depth)
    colours = gaussian_filter(rng.uniform(0, 255, (height, width, 3)), (1, 1, 0))
    colours = 255 * (colours - colours.min()) / (colours.max() - colours.min())
    return colours.astype(np.uint8), z_depth.astype(np.float32)


def random_camera(seed: int, size: tuple[int, int], K: np.ndarray | None = None) -> Camera:
    """Return a camera that is never the source's: an orbit of up to ±90°, or a slide or dolly into the scene."""
    rng = np.random.default_rng([seed, 2])
    angle, radius = np.radians(rng.uniform(5, 90)) * rng.choice([-1, 1]), rng.uniform(1.4, 2.5)
    eye = radius * np.array([np.sin(angle), rng.uniform(-0.3, 0.3), 1 - np.cos(angle)])
    if seed % 4 == 3:
        eye = rng.uniform((-0.8, -0.5, 0.2), (0.8, 0.5, 1.3))
    target = np.array([0, 0, radius]) + rng.uniform(-0.1, 0.1, 3)
    up = (rng.uniform(-0.2, 0.2), -1.0, 0.0)
    return Camera(intrinsics(size) if K is None else K, look_at(eye, target, up), size)
