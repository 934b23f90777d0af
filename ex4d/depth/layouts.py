"""The npz layouts of depth programs: the key of the depth and the convention of the cameras.

| layout | depth | cameras | intrinsics |
|---|---|---|---|
| ours, `ex4d` | `z_depth` or `disparity` | `w2c` [N, 4, 4], OpenCV | `K` [3, 3] |
| Depth Anything 3 (npz, mini_npz) | `depth`, z-depth | `extrinsics` [N, 3, 4], OpenCV w2c | `intrinsics` [N, 3, 3] |
| the same without cameras | `depth` beside `conf`, `image` or `intrinsics` | none | `intrinsics`, or none |
| VGGT | `depth` [N, H, W, 1], z-depth | `extrinsic` [N, 3, 4], OpenCV w2c | `intrinsic` [N, 3, 3] |
| MegaSaM | `depths`, z-depth | `cam_c2w` [N, 4, 4], OpenCV | `intrinsic` [3, 3] |
| Pi3, Pi3X | z of `local_points` [N, H, W, 3] | `camera_poses` [N, 4, 4], OpenCV c2w | from the points |
| the demo of Pi3 | `points` [N, H, W, 3] in the world | the same | the same |
| DepthCrafter | `depth` alone, disparity, 1 is near | none | none |
| Video Depth Anything with `--metric` | `depths`, z-depth | none | none |

Intrinsics are in px of the stored maps; the unit of the cameras is that of the z-depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ex4d.geometry.camera import invert, nearest_rigid
from ex4d.geometry.pose_file import check_poses, squared

MAX_ZOOM = 0.05  # networks estimate a focal length per frame: largest relative deviation from the clip's median


@dataclass(frozen=True)
class Layout:
    """How one program names its arrays: depth (and its kind), K and poses; `c2w`: poses are camera-to-world.

    beside: at least one of these arrays must be present, too; (): no such condition.
    """

    depth: str
    kind: str
    K: str = "K"
    poses: str = ""
    c2w: bool = False
    beside: tuple[str, ...] = ()


# The first layout whose depth and cameras are both present is used.
LAYOUTS = (
    Layout("z_depth", "z_depth", poses="w2c"),
    Layout("disparity", "disparity"),
    Layout("z_depth", "z_depth"),
    Layout("depth", "z_depth", "intrinsics", "extrinsics"),
    Layout("depth", "z_depth", "intrinsic", "extrinsic"),
    Layout("depths", "z_depth", "intrinsic", "cam_c2w", c2w=True),
    Layout("local_points", "z_depth", poses="camera_poses", c2w=True),
    Layout("points", "z_depth", poses="camera_poses", c2w=True),
    Layout("depth", "z_depth", "intrinsics", beside=("conf", "image", "intrinsics")),
    Layout("depth", "disparity"),
    Layout("depths", "z_depth"),
)


def of(names: set[str]) -> Layout | None:
    """Return the layout of a file with these arrays; None if none of them is a depth."""
    complete = (one for one in LAYOUTS if one.depth in names and one.poses in names | {""})
    return next((one for one in complete if not one.beside or names & set(one.beside)), None)


def cameras(poses: np.ndarray, layout: Layout, index: np.ndarray) -> np.ndarray:
    """Return w2c float64 [T, 4, 4] of the frames `index`, the first the identity. Raises ValueError for other poses."""
    w2c = _w2c(poses, layout, index)
    return w2c @ invert(w2c[0])


def in_cameras(points: np.ndarray, poses: np.ndarray, layout: Layout, index: np.ndarray) -> np.ndarray:
    """Transform world points [T, H, W, 3] to the axes of the cameras of the frames `index`."""
    w2c = _w2c(poses, layout, index)[:, None]
    return np.asarray(points @ w2c[..., :3, :3].swapaxes(-1, -2) + w2c[..., None, :3, 3], points.dtype)


def _w2c(poses: np.ndarray, layout: Layout, index: np.ndarray) -> np.ndarray:
    if (
        poses.dtype.kind not in "fiu"
        or poses.ndim != 3
        or poses.shape[1:] not in ((3, 4), (4, 4))
        or index.max(initial=0) >= len(poses)
    ):
        raise ValueError(f"{layout.poses} is {list(poses.shape)}, not [N, 4, 4] with a pose for each depth map")
    chosen = squared(np.asarray(poses, np.float64)[index])
    check_poses(chosen)
    w2c = nearest_rigid(chosen)
    return invert(w2c) if layout.c2w else w2c


def one_lens(K: np.ndarray) -> np.ndarray:
    """Reduce one K per frame to their median [3, 3]. Raises ValueError if they differ too much: the lens zooms."""
    if K.ndim != 3 or not len(K):
        return K
    middle = np.median(K, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.abs(K[:, [0, 1], [0, 1]] / middle[[0, 1], [0, 1]] - 1).max()
    if not spread <= MAX_ZOOM:
        raise ValueError("K changes along the video (a zoom); one K for all frames is read")
    return middle


def lens_of_points(points: np.ndarray) -> np.ndarray:
    """Fit K [3, 3] px, principal point in the centre, to points [T, H, W, 3] in the axes of their cameras."""
    height, width = points.shape[1:3]
    x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
    good = np.isfinite(points).all(axis=-1) & (z > 0)
    lens = np.array([[1.0, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    across = np.broadcast_to(np.arange(width) + 0.5 - width / 2, z.shape)[good]
    down = np.broadcast_to(np.arange(height)[:, None] + 0.5 - height / 2, z.shape)[good]
    for axis, (offset, side) in enumerate(((across, x), (down, y))):
        slope = side[good] / z[good]
        lens[axis, axis] = (offset * slope).sum() / max(float((slope * slope).sum()), 1e-12)
    return lens
