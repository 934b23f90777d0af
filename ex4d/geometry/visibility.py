"""Masks of what a novel camera sees of a frame or of what tracked points cover, and their erosion. True = kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ex4d.geometry import visibility_kernels as kernels
from ex4d.geometry.camera import Camera
from ex4d.geometry.mesh import DWMesh, angle_threshold_deg, occlusion_flags
from ex4d.geometry.profiles import Profile
from ex4d.geometry.render import cpu

COVER = 1.25  # side of a point's square in grid spacings: neighbours that drift apart a little leave no gap


def novel_view(mesh: DWMesh, w2c: np.ndarray) -> np.ndarray:
    """Return bool [H, W], in the novel camera's pixels: True where the rendered mesh shows colour."""
    return cpu.render_visible(mesh, Camera(mesh.K, w2c, mesh.size))


def visibility(z_depth: np.ndarray, mesh: DWMesh, w2c: np.ndarray, tolerance: float = 0.02) -> np.ndarray:
    """Return bool [H, W], in the source's pixels: True where a novel camera sees the surface. See `seen`.

    Args:
        z_depth: float32 [H, W] of the source frame, with its true border depth, which the mesh has pushed back.
        mesh: the DW-Mesh of that frame.
        w2c: [4, 4] of the novel camera; world = the frame's own camera.
        tolerance: how far a point may lie behind the rendered surface, as a fraction of the surface's depth.
    """
    drawn = cpu.render_depth(mesh, Camera(mesh.K, w2c, mesh.size))
    return seen(z_depth, mesh.K, w2c, tears(z_depth, mesh.K, mesh.profile), drawn, tolerance)


def tears(z_depth: np.ndarray, K: np.ndarray, profile: Profile) -> np.ndarray:
    """Return bool [2, H−1, W−1]: the faces at a depth edge of the true depth, whose border is not pushed back."""
    return occlusion_flags(
        np.ascontiguousarray(z_depth, np.float32), K, np.radians(angle_threshold_deg(K[0, 0], profile))
    )


def seen(
    z_depth: np.ndarray, K: np.ndarray, w2c: np.ndarray, torn: np.ndarray, drawn: np.ndarray, tolerance: float
) -> np.ndarray:
    """Return bool [H, W], in the source's pixels: True where a novel camera sees the surface, by its shadow map.

    A pixel is kept if it projects into the novel picture, lies no deeper than the farthest of the four shadow-map
    samples around that point (a sample is up to a pixel away, and at 80° a pixel spans many depths), and at least one
    of its faces is not torn and faces the camera. Its faces need not win a pixel of the novel picture: minified faces
    do not, and a plane at 80° would keep 35 %. Without the winding test, pixels just behind a silhouette would count as
    visible, because they are hardly deeper.

    Args:
        torn: bool [2, H−1, W−1], result of `tears`.
        drawn: float32 [h, w], the shadow map: z-depth in the novel camera's field of view, at any resolution.
    """
    kept = np.empty(z_depth.shape, bool)
    depth, w2c = np.ascontiguousarray(z_depth, np.float32), np.ascontiguousarray(w2c, np.float64)
    kernels.see(depth, _lens(K), w2c, torn, drawn, tolerance, kept)
    return kept


def landing(z_depth: np.ndarray, K: np.ndarray, w2c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project each source pixel to the novel camera: (u, v, z) float64 [H, W]; u, v = −1 behind the camera."""
    depth = np.ascontiguousarray(z_depth, np.float32)
    landed = np.empty((depth.shape[0], 3, depth.shape[1]))
    kernels.land(depth, _lens(K), np.ascontiguousarray(w2c, np.float64), landed)
    return landed[:, 0], landed[:, 1], landed[:, 2]


def _lens(K: np.ndarray) -> tuple[float, float, float, float]:
    return float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])


def tracking(xy: np.ndarray, seen: np.ndarray, spacing: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return bool [T, H, W]: what the seen points cover, each a square of 1.25 spacings of their grid in frame 0.

    Args:
        xy: float [T, N, 2] px, positions of the points (`tracks.track`).
        seen: bool [T, N].
        spacing: (x, y) px between neighbours of the grid.
        size: (H, W).
    """
    height, width = size
    first = np.clip(np.rint(xy - COVER * np.asarray(spacing) / 2), 0, (width, height)).astype(int)
    last = np.clip(np.rint(xy + COVER * np.asarray(spacing) / 2), 0, (width, height)).astype(int)
    # Each square adds +1 and −1 at its corners; the running sums along both axes count the squares over a pixel.
    corners = np.zeros((len(xy), height + 1, width + 1), np.int32 if seen.shape[1] > 2**14 else np.int16)
    t, n = np.nonzero(seen)
    for y, x, sign in ((first, first, 1), (first, last, -1), (last, first, -1), (last, last, 1)):
        np.add.at(corners, (t, y[t, n, 1], x[t, n, 0]), sign)
    for row in range(1, height):  # a running sum down the columns, many times faster than cumsum along that axis
        corners[:, row] += corners[:, row - 1]
    return np.cumsum(corners, axis=2, out=corners)[:, :height, :width] > 0


def kept_share(visible: np.ndarray) -> np.ndarray:
    """Return float64 [T]: the kept share of each frame of bool [T, H, W]."""
    return np.array([np.count_nonzero(frame) for frame in visible]) / visible[0].size


def erode(visible: np.ndarray, erosion_px: int) -> np.ndarray:
    """Erode the kept region of every frame but the first by a square; bool [T, H, W].

    Args:
        erosion_px: side of the square at 512 px; it scales with the shorter side, and below 2 px it has no effect. The
            picture's border does not erode the region.
    """
    eroded = erode_all(visible, erosion_px)
    eroded[:1] = visible[:1]
    return eroded


def erode_all(visible: np.ndarray, erosion_px: int) -> np.ndarray:
    """Erode the kept region of every frame, including the first; see `erode`."""
    return erode_by(visible, erosion_side(erosion_px, visible.shape[1:]))


def erode_by(visible: np.ndarray, side: int) -> np.ndarray:
    """Erode the kept region of every frame by a square of `side` px; bool [T, H, W]."""
    import cv2

    if side < 2:
        return visible.copy()
    kernel, eroded = np.ones((side, side), np.uint8), np.empty(visible.shape, np.uint8)
    for frame, target in zip(np.ascontiguousarray(visible).view(np.uint8), eroded, strict=True):
        cv2.erode(frame, kernel, dst=target)
    return eroded.view(bool)


def erosion_side(erosion_px: int, size: Sequence[int]) -> int:
    """Return the side in px, at size (H, W), of the square that has `erosion_px` at 512 px."""
    return round(erosion_px * min(size) / 512)
