"""What a novel camera sees of a frame, what tracked points cover, and erosion: bool masks, True = kept."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.camera import Camera, pixel_rays
from ex4d.geometry.mesh import DWMesh, angle_threshold_deg, occlusion_flags
from ex4d.geometry.render import render

COVER = 1.25  # side of a point's square in spacings of the grid: neighbours that drift apart leave no gap


def novel_view(mesh: DWMesh, w2c: np.ndarray) -> np.ndarray:
    """Return bool [H, W], in the novel camera's pixels: what the mesh fills with colour there."""
    return render(mesh, Camera(mesh.K, w2c, mesh.size), backend="cpu").visible_mask


def visibility(z_depth: np.ndarray, mesh: DWMesh, w2c: np.ndarray, tolerance: float = 0.02) -> np.ndarray:
    """Return bool [H, W], in the source's pixels: whose surface a novel camera sees.

    A pixel is kept when it falls inside the novel picture, lies no farther than the farthest of the four surfaces drawn
    around that place (a shadow map's sample lies up to a pixel away, and at 80° a pixel is many depths), and one of its
    faces at least is whole and turned towards the camera. Whether its faces are among those that are drawn must not
    count: minified faces win no pixel, and a plane at 80° would keep 35 %.

    Args:
        z_depth: float32 [H, W] of the source frame, its border included, which the mesh has pushed back.
        mesh: the DW-Mesh of that frame.
        w2c: [4, 4] of the novel camera; world = the frame's own camera.
        tolerance: share of its depth that a point may lie behind the drawn surface.
    """
    height, width = mesh.size
    K = mesh.K
    u, v, z = landing(z_depth, K, w2c)
    inside = (z > 1e-9) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    drawn = render(mesh, Camera(K, w2c, mesh.size), backend="cpu").z_depth
    farthest = np.pad(drawn, 1, mode="edge")
    farthest = np.maximum(farthest[:-1], farthest[1:])
    farthest = np.maximum(farthest[:, :-1], farthest[:, 1:])  # [i, j]: the four pixels around the corner (j, i)
    row = np.clip(np.rint(v), 0, height).astype(int)
    column = np.clip(np.rint(u), 0, width).astype(int)
    return inside & (z <= farthest[row, column] * (1 + tolerance)) & _has_good_face(z_depth, mesh, u, v, z > 1e-9)


def landing(z_depth: np.ndarray, K: np.ndarray, w2c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (u, v, z) float64 [H, W]: where the novel camera sees each source pixel; u, v = −1 behind it."""
    points = (pixel_rays(z_depth.shape, K) * z_depth[..., None]) @ w2c[:3, :3].T + w2c[:3, 3]
    z = points[..., 2]
    safe = np.where(z > 1e-9, z, np.inf)
    ahead = z > 1e-9
    u = np.where(ahead, points[..., 0] / safe * K[0, 0] + K[0, 2], -1)
    v = np.where(ahead, points[..., 1] / safe * K[1, 1] + K[1, 2], -1)
    return u, v, z


def _has_good_face(z_depth: np.ndarray, mesh: DWMesh, u: np.ndarray, v: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Return bool [H, W]: one face around the pixel at least is not torn, and turned towards the novel camera.

    Torn is judged by the real depth, the border not pushed. Turned towards it are the faces that keep their winding in
    the novel picture (u, v): without this test the pixels just behind a limb pass for seen, being hardly deeper.
    """
    angle = np.radians(angle_threshold_deg(mesh.K[0, 0], mesh.profile))
    bad = occlusion_flags(np.ascontiguousarray(z_depth, np.float32), mesh.K, angle)
    right, down, diagonal = np.s_[:-1, 1:], np.s_[1:, :-1], np.s_[1:, 1:]
    corner = np.s_[:-1, :-1]

    def winding(a: tuple, b: tuple, c: tuple) -> np.ndarray:
        area = (u[b] - u[a]) * (v[c] - v[a]) - (u[c] - u[a]) * (v[b] - v[a])
        return (area > 0) & ahead[a] & ahead[b] & ahead[c]

    first = ~bad[0] & winding(corner, right, down)
    second = ~bad[1] & winding(diagonal, down, right)
    good = np.zeros(mesh.size, bool)
    good[corner] |= first
    good[down] |= first | second
    good[right] |= first | second
    good[diagonal] |= second
    return good


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
    corners = np.zeros((len(xy), height + 1, width + 1), np.int32)
    t, n = np.nonzero(seen)
    for y, x, sign in ((first, first, 1), (first, last, -1), (last, first, -1), (last, last, 1)):
        np.add.at(corners, (t, y[t, n, 1], x[t, n, 0]), sign)
    return corners.cumsum(axis=1).cumsum(axis=2)[:, :height, :width] > 0


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
