"""Masks of what a novel camera sees of a frame, of what tracked points cover, and their erosion: True = kept."""

from __future__ import annotations

import numpy as np

from ex4d.geometry import visibility_kernels as kernels
from ex4d.geometry.camera import Camera
from ex4d.geometry.mesh import DWMesh, angle_threshold_deg, occlusion_flags
from ex4d.geometry.render import cpu

COVER = 1.25  # side of a point's square in spacings of the grid: neighbours that drift apart leave no gap


def novel_view(mesh: DWMesh, w2c: np.ndarray) -> np.ndarray:
    """Return bool [H, W], in the novel camera's pixels: what the mesh fills with colour there."""
    return cpu.render_visible(mesh, Camera(mesh.K, w2c, mesh.size))


def visibility(
    z_depth: np.ndarray, mesh: DWMesh, w2c: np.ndarray, tolerance: float = 0.02, drawn: np.ndarray | None = None
) -> np.ndarray:
    """Return bool [H, W], in the source's pixels: True where a novel camera sees the surface.

    A pixel is kept if it falls inside the novel picture, lies no farther than the farthest of the four surfaces drawn
    around that place (a sample of a shadow map lies up to a pixel away, and at 80° a pixel spans many depths), and at
    least one of its faces is whole and turned towards the camera. Whether its faces are drawn does not count: minified
    faces win no pixel, and a plane at 80° would keep 35 %.

    Args:
        z_depth: float32 [H, W] of the source frame, its border included, which the mesh has pushed back.
        mesh: the DW-Mesh of that frame.
        w2c: [4, 4] of the novel camera; world = the frame's own camera.
        tolerance: share of its depth that a point may lie behind the drawn surface.
        drawn: float32 [H, W], z-depth that the novel camera sees; None: render the mesh.
    """
    if drawn is None:
        drawn = cpu.render_depth(mesh, Camera(mesh.K, w2c, mesh.size))
    depth = np.ascontiguousarray(z_depth, np.float32)
    # Tears are found in the real depth, whose border is not pushed back. Without the test of winding, pixels just
    # behind a limb would count as visible, since they are hardly deeper.
    torn = occlusion_flags(depth, mesh.K, np.radians(angle_threshold_deg(mesh.K[0, 0], mesh.profile)))
    u, v, z = landing(depth, mesh.K, w2c)
    kept = np.zeros(mesh.size, bool)
    kernels.mark_good(torn, u, v, z, kept)
    kernels.keep_seen(u, v, z, drawn, tolerance, kept)
    return kept


def landing(z_depth: np.ndarray, K: np.ndarray, w2c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (u, v, z) float64 [H, W]: where the novel camera sees each source pixel; u, v = −1 behind it."""
    u, v, z = (np.empty(z_depth.shape) for _ in range(3))
    intrinsics = (float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2]))
    depth = np.ascontiguousarray(z_depth, np.float32)
    kernels.land(depth, intrinsics, np.ascontiguousarray(w2c, np.float64), u, v, z)
    return u, v, z


def tracking(xy: np.ndarray, seen: np.ndarray, spacing: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return bool [T, H, W]: what the seen points cover, each a square of 1.25 spacings of their grid in frame 0.

    Args:
        xy: float [T, N, 2] px, where the points are (`tracks.track`).
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
    """Return bool [T, H, W] with the kept region of every frame but the first shrunk by a square.

    Args:
        erosion_px: its side at 512 px; it scales with the shorter side, and below 2 px nothing happens. The picture's
            border does not erode.
    """
    eroded = erode_all(visible, erosion_px)
    eroded[:1] = visible[:1]
    return eroded


def erode_all(visible: np.ndarray, erosion_px: int) -> np.ndarray:
    """Return bool [T, H, W] with the kept region of every frame shrunk; see `erode`."""
    import cv2

    side = round(erosion_px * min(visible.shape[1:]) / 512)
    if side < 2:
        return visible.copy()
    kernel = np.ones((side, side), np.uint8)
    return np.stack([cv2.erode(frame.view(np.uint8), kernel) for frame in np.ascontiguousarray(visible)]).view(bool)
