"""Pinhole cameras. OpenCV axes (x right, y down, z forward), world-to-camera 4×4, pixel centres at +0.5."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ex4d.config import setting
from ex4d.errors import ConfigError

# Limits in longer sides. Real lenses have focal lengths of 0.2 to 60; far beyond, rendering is slow or overflows.
FOCAL, CENTRE = (0.01, 1000.0), 100.0
LENS_CENTRE = (0.1, 0.9)  # as a fraction of a side; shift lenses reach 0.17 to 0.83
FOV_DEG = 54.0  # default over the longer side, when the camera is unknown


def fov_setting() -> Any:
    """Return the setting `fov_deg`, which several sections of the configuration share."""
    help = (
        "Field of view over the longer side, degrees, if depth has no intrinsics; null: 54, or estimated by parallax."
    )
    return setting(None, help, ge=1, le=170)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Args:
        K: float64 [3, 3] intrinsics in pixels, no skew; the centre of pixel (row i, column j) is at (j + 0.5, i + 0.5).
        w2c: float64 [4, 4] world-to-camera, OpenCV axes, rigid.
        size: (H, W) in pixels.

    Raises:
        ConfigError: wrong shapes, non-finite values, focal lengths or a principal point outside FOCAL or CENTRE for
            this size, or w2c that is not rigid.
    """

    K: np.ndarray
    w2c: np.ndarray
    size: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "K", check_intrinsics(self.K))
        object.__setattr__(self, "w2c", check_rigid(self.w2c))
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))
        if min(self.size) < 1:
            raise ConfigError("camera.size", self.size, "(H, W), both at least 1")
        focal, longer = self.K[[0, 1], [0, 1]], max(self.size)
        if not (FOCAL[0] * longer <= focal.min() and focal.max() <= FOCAL[1] * longer):
            raise ConfigError("camera.K", self.K.tolist(), f"focal lengths of {FOCAL[0]} to {FOCAL[1]:g} longer sides")
        if np.abs(self.K[:2, 2]).max() > CENTRE * longer:
            raise ConfigError("camera.K", self.K.tolist(), f"a principal point within {CENTRE:g} longer sides")

    @property
    def eye(self) -> np.ndarray:
        """The camera's centre in the world, float64 [3]."""
        return -self.w2c[:3, :3].T @ self.w2c[:3, 3]

    @property
    def c2w(self) -> np.ndarray:
        """Camera-to-world, float64 [4, 4]."""
        return invert(self.w2c)


def check_intrinsics(K: np.ndarray) -> np.ndarray:
    """Return K as float64 [3, 3]. Raises ConfigError unless it is finite, without skew, with positive focal lengths."""
    K = np.asarray(K, np.float64)
    if K.shape != (3, 3) or not np.isfinite(K).all():
        raise ConfigError("camera.K", K.tolist(), "finite [3, 3]")
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ConfigError(
            "camera.K", K.tolist(), "fx and fy must be positive (flip the y axis of the data where fy < 0)"
        )
    if np.abs([K[0, 1], K[1, 0], K[2, 0], K[2, 1], K[2, 2] - 1]).max() > 1e-9:
        raise ConfigError("camera.K", K.tolist(), "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
    return K


def check_lens(K: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return K as float64 [3, 3]. Raises ConfigError unless it is plausible for uncropped pictures of `size` (H, W).

    The principal point of an uncropped picture lies well inside it. If it does not, K is in fractions of the sides or
    belongs to pictures of another size.
    """
    camera = Camera(K, np.eye(4), size)
    share = camera.K[:2, 2] / (size[1], size[0])
    if not (LENS_CENTRE[0] <= share.min() and share.max() <= LENS_CENTRE[1]):
        low, high = LENS_CENTRE
        raise ConfigError(
            "camera.K", camera.K.tolist(), f"a principal point at {low:g} to {high:g} of either side, in px"
        )
    return camera.K


def check_rigid(w2c: np.ndarray) -> np.ndarray:
    """Return w2c as float64 [4, 4]. Raises ConfigError unless it is a rotation (determinant +1) and a translation."""
    w2c = np.asarray(w2c, np.float64)
    if w2c.shape != (4, 4) or not np.isfinite(w2c).all():
        raise ConfigError("camera.w2c", w2c.tolist(), "finite [4, 4]")
    if not is_rigid(w2c):
        allowed = "a rotation and a translation, last row 0 0 0 1"
        if is_rigid(w2c * np.array([-1, 1, 1, 1])):
            allowed = "determinant +1; this matrix mirrors: convert its axes to OpenCV first"
        raise ConfigError("camera.w2c", w2c.tolist(), allowed)
    return w2c


def is_rigid(poses: np.ndarray, tolerance: float = 1e-4) -> bool:
    """Return whether all of `poses` [..., 4, 4] are rotations (determinant +1) and translations.

    tolerance: allowed error of R Rᵀ (files store poses with 6 to 8 digits); for the last row, a thousandth of it.
    """
    rotation = poses[..., :3, :3]
    square = np.abs(rotation @ np.swapaxes(rotation, -1, -2) - np.eye(3)).max(initial=0)
    last = np.abs(poses[..., 3, :] - (0, 0, 0, 1)).max(initial=0)
    return bool(square < tolerance and last < 1e-3 * tolerance and (np.linalg.det(rotation) > 0).all())


def nearest_rigid(poses: np.ndarray) -> np.ndarray:
    """Return the rigid motions float64 [..., 4, 4] nearest to poses that were rounded when written."""
    rigid = np.array(poses, np.float64)
    left, _, right = np.linalg.svd(rigid[..., :3, :3])
    rigid[..., :3, :3] = left @ right
    rigid[..., 3, :] = (0, 0, 0, 1)
    return rigid


def intrinsics(size: tuple[int, int], fov_deg: float | None = None) -> np.ndarray:
    """Return K float64 [3, 3] for a field of view over the longer side, principal point in the centre of the picture.

    54° is the field of view of f = 500 px at 512 px, the released code's fixed focal length.
    """
    fov_deg = FOV_DEG if fov_deg is None else fov_deg
    if not 1.0 <= fov_deg <= 170.0:
        raise ConfigError("fov_deg", fov_deg, "1 to 170 degrees")
    height, width = size
    focal = 0.5 * max(height, width) / math.tan(math.radians(fov_deg) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float64)


def look_at(eye: np.ndarray, target: np.ndarray, up: tuple[float, float, float] = (0.0, -1.0, 0.0)) -> np.ndarray:
    """Return w2c float64 [..., 4, 4] of cameras at `eye` that look at `target`.

    Args:
        eye, target: world points [..., 3].
        up: world direction that points up in the picture; the default is OpenCV's −y.

    Raises:
        ConfigError: eye equals target, or the line of sight is parallel to `up`.
    """
    eye = np.asarray(eye, np.float64)
    forward = np.asarray(target, np.float64) - eye
    right = np.cross(forward, np.asarray(up, np.float64))
    # forward × up points to the right where y points down in the picture and up is −y.
    far, wide = (np.linalg.norm(vector, axis=-1, keepdims=True) for vector in (forward, right))
    if (far < 1e-12).any() or (wide < 1e-12 * far).any():
        raise ConfigError(
            "look_at", (eye.tolist(), np.asarray(target).tolist()), "eye, target and up must span a plane"
        )
    forward, right = forward / far, right / wide
    rotation = np.stack([right, np.cross(forward, right), forward], axis=-2)
    w2c = np.zeros((*rotation.shape[:-2], 4, 4))
    w2c[..., :3, :3], w2c[..., 3, 3] = rotation, 1
    w2c[..., :3, 3] = -(rotation @ eye[..., None])[..., 0]
    return w2c


def invert(pose: np.ndarray) -> np.ndarray:
    """Return the inverse of rigid transforms float64 [..., 4, 4]."""
    pose = np.asarray(pose, np.float64)
    rotation = np.swapaxes(pose[..., :3, :3], -1, -2)
    inverse = np.zeros_like(pose)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ pose[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


def relative_to(w2c: np.ndarray, source_w2c: np.ndarray) -> np.ndarray:
    """Return w2c float64 [..., 4, 4] with the camera `source_w2c` [..., 4, 4] as the world: w2c · source_w2c⁻¹."""
    return np.asarray(w2c, np.float64) @ invert(source_w2c)


def pixel_rays(size: tuple[int, int], K: np.ndarray, offset: float = 0.5) -> np.ndarray:
    """Return K⁻¹ (u, v, 1) of every pixel, float64 [H, W, 3]; `offset`: position in the pixel (0.5: its centre)."""
    height, width = size
    rays = np.ones((height, width, 3))
    rays[..., 0] = (np.arange(width) + offset - K[0, 2]) / K[0, 0]
    rays[..., 1] = ((np.arange(height) + offset - K[1, 2]) / K[1, 1])[:, None]
    return rays


def unproject(z_depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Unproject z_depth [H, W] at pixel centres to points float64 [H, W, 3] in camera axes."""
    z_depth = np.asarray(z_depth, np.float64)
    return pixel_rays((z_depth.shape[0], z_depth.shape[1]), K) * z_depth[..., None]
