"""Evaluate warps between real pictures with measured depth: frame i rendered from the camera of frame j.

Two data sets of slambook2: ICL-NUIM (ray-traced, exact depth, given poses; fy < 0, so that y is flipped) and a pair of
TUM RGB-D (Kinect; holes in the depth, no poses there: found by PnP from matched features and measured depth).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sight import project

from ex4d.errors import BadSample
from ex4d.evaluate.metrics import psnr
from ex4d.geometry.camera import Camera, invert, unproject
from ex4d.geometry.mesh import build
from ex4d.geometry.render import render

ICL_K = np.array([[481.2, 0, 320.0], [0, 480.0, 240.0], [0, 0, 1]])  # pixel centres at integers there: +0.5
TUM_K = np.array([[520.9, 0, 325.6], [0, 521.0, 250.2], [0, 0, 1]])
DEPTH_SCALE = 5000.0  # both: png value / metre
AGREE = 0.02  # relative depth difference above which two points lie on different surfaces
FLIP_Y = np.diag([1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class View:
    """A picture with measured depth: frame uint8 [H, W, 3], z_depth float32 [H, W] in metres (0: unknown), w2c, K."""

    frame: np.ndarray
    z_depth: np.ndarray
    w2c: np.ndarray
    K: np.ndarray


@dataclass(frozen=True)
class PairScore:
    """Figures of a warp against the other picture.

    psnr: dB over the pixels marked visible; psnr_still: the same pixels of the unwarped source picture.
    psnr_same_surface: dB over the visible pixels whose rendered depth is within 2 % of the measured one.
    coverage: share of the picture marked visible. recall: share marked visible of the pixels that the source sees too,
    by the measured depth of both. depth_error: median |rendered − measured| / measured over the visible pixels.
    """

    psnr: float
    psnr_still: float
    psnr_same_surface: float
    coverage: float
    recall: float
    depth_error: float


def load_icl(folder: str | Path) -> list[View]:
    """Return the five views of `ch12/dense_RGBD/data`."""
    from scipy.spatial.transform import Rotation

    folder = Path(folder)
    views = []
    for index, row in enumerate(np.loadtxt(folder / "pose.txt"), 1):
        c2w = np.eye(4)
        c2w[:3, :3], c2w[:3, 3] = Rotation.from_quat(row[3:]).as_matrix(), row[:3]
        frame, z_depth = _read(folder / "color" / f"{index}.png", folder / "depth" / f"{index}.png")
        views.append(View(frame, z_depth, FLIP_Y @ np.linalg.inv(c2w) @ FLIP_Y, ICL_K))
    return views


def load_tum(folder: str | Path) -> list[View]:
    """Return the two views of `ch7`; the second's pose by PnP, world = the first camera."""
    folder = Path(folder)
    pairs = [_read(folder / f"{index}.png", folder / f"{index}_depth.png") for index in (1, 2)]
    pose = relative_pose(pairs[0][0], pairs[0][1], pairs[1][0], TUM_K)
    return [View(*pairs[0], np.eye(4), TUM_K), View(*pairs[1], pose, TUM_K)]


def _read(picture: Path, depth: Path) -> tuple[np.ndarray, np.ndarray]:
    import cv2

    frame, values = cv2.imread(str(picture)), cv2.imread(str(depth), cv2.IMREAD_UNCHANGED)
    if frame is None or values is None:
        raise BadSample("image_missing", f"{picture.name} or {depth.name} is not a picture")
    return np.ascontiguousarray(frame[..., ::-1]), (values / DEPTH_SCALE).astype(np.float32)


def relative_pose(frame: np.ndarray, z_depth: np.ndarray, other: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Return w2c float64 [4, 4] of `other`, world = the camera of `frame`, from ORB matches, depth and RANSAC PnP.

    Raises:
        BadSample: no_pose, if fewer than 30 matches agree.
    """
    import cv2

    orb = cv2.ORB.create(2000)
    (keys, first), (others, second) = (orb.detectAndCompute(f, None) for f in (frame, other))
    matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(first, second)
    uv = np.array([keys[m.queryIdx].pt for m in matches])
    seen = np.array([others[m.trainIdx].pt for m in matches]) + 0.5
    row, column = uv.round().astype(int).T[::-1]
    known = z_depth[row, column] > 0
    points = unproject(z_depth, K)[row, column]
    cv2.setRNGSeed(0)
    found, turn, shift, inliers = cv2.solvePnPRansac(points[known], seen[known], K, None, reprojectionError=2.0)
    if not found or len(inliers) < 30:
        raise BadSample("no_pose", f"{0 if inliers is None else len(inliers)} matches agree")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = cv2.Rodrigues(turn)[0], shift[:, 0]
    return pose


def score(source: View, target: View, profile: str = "default") -> PairScore:
    """Return the figures of `source` rendered from the camera of `target`. Raises BadSample `no_overlap`."""
    z_depth, known = _filled(source.z_depth)
    pose = target.w2c @ invert(source.w2c)
    camera = Camera(target.K, pose, (target.frame.shape[0], target.frame.shape[1]))
    seen = render(build(source.frame, z_depth, source.K, profile), camera, "cpu")
    sure = render(build(np.repeat(known[..., None] * np.uint8(255), 3, -1), z_depth, source.K, profile), camera, "cpu")
    visible = seen.visible_mask & (sure.colour[..., 0] == 255)
    if not visible.any():
        raise BadSample("no_overlap", "the target camera sees nothing of the source")
    measured = target.z_depth > 0
    error = np.abs(seen.z_depth / np.where(measured, target.z_depth, np.nan) - 1)
    truly = _truly_seen(source, target, pose)
    return PairScore(
        psnr=psnr(seen.colour, target.frame, visible),
        psnr_still=psnr(source.frame, target.frame, visible),
        psnr_same_surface=psnr(seen.colour, target.frame, visible & (error < AGREE)),
        coverage=float(visible.mean()),
        recall=float((visible & truly).sum() / max(truly.sum(), 1)),
        depth_error=float(np.nanmedian(error[visible])),
    )


def _filled(z_depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (z_depth with unknown pixels filled from their nearest known neighbour, known bool [H, W])."""
    from scipy.ndimage import distance_transform_edt

    known = z_depth > 0
    if not known.any():
        raise BadSample("depth_missing", "no pixel has a measured depth")
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return z_depth[tuple(nearest)], known


def _truly_seen(source: View, target: View, pose: np.ndarray) -> np.ndarray:
    """Return bool [H, W]: pixels of the target whose measured point the source measured too."""
    points = unproject(target.z_depth, target.K)
    uv, z = project(points, Camera(source.K, invert(pose), source.z_depth.shape))
    inside = (z > 0) & (target.z_depth > 0)
    height, width = source.z_depth.shape
    column, row = (np.floor(np.where(inside, uv[..., k], -1)).astype(int) for k in (0, 1))
    inside &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    there = source.z_depth[row.clip(0, height - 1), column.clip(0, width - 1)]
    return inside & (there > 0) & (np.abs(there / np.where(z > 0, z, 1) - 1) < AGREE)
