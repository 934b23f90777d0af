"""Depth from a moving camera by classical geometry: no weights, for laptops and tests; for quality take a network.

Optical flow (DIS) between frames 1, 2, 4 apart → essential matrix and `recoverPose` for one pair with a wide
baseline → every other camera by robust resection, cameras and points refined in turn → inverse depth of every pixel, by
least squares over all its flows (weights: forward–backward consistency, and the epipolar residual, which takes moving
objects out) → fusion with what neighbouring frames say of the same point → gaps filled from around them.

It needs a camera that moves sideways or forward; one that stands or only turns is BadSample("no_parallax"). The scale
is arbitrary. Intrinsics are assumed: a field of view of 54° over the longer side, as where no estimator gives one.
Everything runs on one thread and equal input gives equal output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from ex4d.depth import DepthRequest, DepthResult
from ex4d.errors import BadSample
from ex4d.geometry.camera import FOV_DEG, intrinsics, pixel_rays
from ex4d.geometry.tracks import Flows, consistency, one_thread, pair_flows, sample

GAPS = (1, 2, 4)
MIN_MOTION_PX = 0.3  # below it DIS measures noise (its median error is 0.15–0.3 px)
MIN_PARALLAX_PX = 0.5  # displacement that a turning camera does not explain
MAX_STILL_SHARE = 0.4  # of the textured pixels: more than that and the camera stands
ENOUGH_PARALLAX_PX = 8.0  # more does not make a better first pair
RESIDUAL_PX = 0.5  # scale of the Cauchy weights
MIN_SHARE = 0.3  # of the points must have a consistent flow, and fit the camera's motion
GRID = 24  # points along the shorter side that poses are found with
NUM_ROUNDS = 3  # of cameras and points in turn


def estimate(frames: np.ndarray, request: DepthRequest) -> DepthResult:
    """Return z_depth float32 [T, H, W] of arbitrary scale (median 1 over the clip) for frames uint8 [T, H, W, 3].

    Raises:
        BadSample: no_parallax, where the camera does not move, only turns, or its motion cannot be found.
    """
    num_frames, height, width = frames.shape[:3]
    if num_frames < 2:
        raise BadSample("no_parallax", "one frame has no parallax")
    with one_thread():
        flows = pair_flows(frames, GAPS)
        _check_motion(frames, flows)
        weights = {pair: np.exp(-np.square(consistency(flows[pair], flows[pair[::-1]]))) for pair in flows}
        K = intrinsics((height, width))
        rays = pixel_rays((height, width), K).astype(np.float32)
        step = max(1, min(height, width) // GRID)
        poses = _poses(_matches(flows, weights, rays, K, step), num_frames)
        matches = _matches(flows, weights, rays, K, 1)
        views = [_inverse_depth(i, matches, poses) for i in range(num_frames)]
        fused = np.stack([_fuse(i, views, flows, weights, rays, poses) for i in range(num_frames)])
    values = (1.0 / fused).astype(np.float32)
    values /= np.median(values)
    return DepthResult(values, "z_depth", K, False, {"estimator": "parallax", "fov_deg": FOV_DEG})


def _check_motion(frames: np.ndarray, flows: Flows) -> None:
    """Raise BadSample no_parallax for a camera that stands: much of the texture does not move in any pair of frames."""
    import cv2

    widest = max(j - i for i, j in flows)
    share = []
    for (i, j), flow in flows.items():
        if j - i == widest:
            gray = cv2.cvtColor(frames[i], cv2.COLOR_RGB2GRAY).astype(np.float32)
            slope = np.abs(cv2.Sobel(gray, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(gray, cv2.CV_32F, 0, 1))
            textured = slope >= np.median(slope)
            share.append((np.linalg.norm(flow, axis=-1)[textured] < MIN_MOTION_PX).mean())
    if min(share) > MAX_STILL_SHARE:
        raise BadSample("no_parallax", f"{min(share):.0%} of the texture stands still: the camera does not move")


@dataclass(frozen=True)
class _Matches:
    """Flows as rays: what the geometry works on, for every pixel or for a grid of them.

    rays: float32 [h, w, 3], z = 1. seen: (i, j) → [h, w, 2], where frame i's pixel lies in j, as x / z, y / z.
    weights: (i, j) → [h, w]. focal: px.
    """

    rays: np.ndarray
    seen: Flows
    weights: Flows
    focal: float

    def partners(self, i: int, poses: dict[int, np.ndarray]) -> list[int]:
        return [j for a, j in self.seen if a == i and j in poses]


def _matches(flows: Flows, weights: Flows, rays: np.ndarray, K: np.ndarray, step: int) -> _Matches:
    cut = (slice(step // 2, None, step), slice(step // 2, None, step))
    scale = np.array([1 / K[0, 0], 1 / K[1, 1]], np.float32)
    seen = {pair: rays[cut][..., :2] + flow[cut] * scale for pair, flow in flows.items()}
    return _Matches(rays[cut], seen, {pair: weight[cut] for pair, weight in weights.items()}, float(K[0, 0]))


def _first_pair(matches: _Matches) -> tuple[int, int, np.ndarray]:
    """Return (i, j, w2c of j seen from i, unit baseline) of the pair whose parallax is large and consistent."""
    import cv2

    best, best_score = None, 0.0
    for (i, j), seen in matches.seen.items():
        keep = matches.weights[i, j] > 0.5
        if j < i or keep.sum() < 32 or keep.mean() < MIN_SHARE:
            continue
        a, b = matches.rays[keep].astype(np.float64), seen[keep].astype(np.float64)
        threshold = RESIDUAL_PX / matches.focal
        essential, mask = cv2.findEssentialMat(a[:, :2], b, np.eye(3), cv2.RANSAC, 0.999, threshold)
        if essential is None or essential.shape != (3, 3):
            continue
        count, rotation, translation, _ = cv2.recoverPose(essential, a[:, :2], b, np.eye(3), mask=mask)
        parallax = np.percentile(_turning_residual(a, b), 80) * matches.focal
        score = min(parallax, ENOUGH_PARALLAX_PX) * count / keep.size
        if parallax > MIN_PARALLAX_PX and count > MIN_SHARE * keep.size and score > best_score:
            pose = np.eye(4)
            pose[:3, :3], pose[:3, 3] = rotation, translation[:, 0]
            best, best_score = (i, j, pose), score
    if best is None:
        raise BadSample("no_parallax", "no pair of frames shows a displacement that a turning camera does not explain")
    return best


def _turning_residual(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return |b − a turned| [N] for rays a [N, 3] seen at b [N, 2], by the rotation that explains most (Kabsch, L1)."""
    directions = a / np.linalg.norm(a, axis=1, keepdims=True)
    targets = np.concatenate([b, np.ones((len(b), 1))], axis=1)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    weight = np.ones(len(a))
    for _ in range(5):
        rotation, _ = Rotation.align_vectors(targets, directions, weight)
        turned = rotation.apply(directions)
        residual = np.linalg.norm(b - turned[:, :2] / turned[:, 2:], axis=1)
        weight = 1 / np.maximum(residual, 1e-4)
    return residual


def _poses(matches: _Matches, num_frames: int) -> dict[int, np.ndarray]:
    """Return w2c [4, 4] of every frame: resection outwards from the first pair, then rounds of cameras and points."""
    first, second, pose = _first_pair(matches)
    poses = {first: np.eye(4), second: pose}
    while len(poses) < num_frames:
        points = {i: _inverse_depth(i, matches, poses) for i in poses}
        missing = [j for j in range(num_frames) if j not in poses]
        j = min(missing, key=lambda j: min(abs(j - i) for i in poses))
        poses[j] = _resect(j, poses[min(poses, key=lambda i: abs(i - j))], points, matches, poses)
    for _ in range(NUM_ROUNDS):
        points = {i: _inverse_depth(i, matches, poses) for i in poses}
        poses = {j: poses[j] if j == first else _resect(j, poses[j], points, matches, poses) for j in poses}
        # the scale is free: keep the baseline of the first pair at 1
        length = np.linalg.norm((poses[second] @ np.linalg.inv(poses[first]))[:3, 3])
        for j in poses:
            poses[j][:3, 3] /= length
    return poses


def _inverse_depth(i: int, matches: _Matches, poses: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (1/z, confidence), both float32 [h, w], of frame i from all its matches with posed frames.

    A point at inverse depth q on the ray d is seen from j at x with R d + q t = s (x, 1): two equations a match, linear
    in q. Confidence is their information in px² per unit of q.
    """
    rows, sights, weights = [], [], []
    for j in matches.partners(i, poses):
        relative = (poses[j] @ np.linalg.inv(poses[i])).astype(np.float32)
        turned = matches.rays @ relative[:3, :3].T
        seen, shift = matches.seen[i, j], relative[:3, 3]
        rows.append((seen * shift[2] - shift[:2]) / turned[..., 2:])
        sights.append((turned[..., :2] - seen * turned[..., 2:]) / turned[..., 2:])
        weights.append(matches.weights[i, j])
    if not rows:
        return np.ones(matches.rays.shape[:2], np.float32), np.zeros(matches.rays.shape[:2], np.float32)
    a, b, base = np.stack(rows), np.stack(sights), np.stack(weights)
    weight = base
    for _ in range(3):
        information = (weight[..., None] * a * a).sum(axis=(0, 3))
        inverse = (weight[..., None] * a * b).sum(axis=(0, 3)) / np.maximum(information, 1e-12)
        residual = np.square(inverse[None, ..., None] * a - b).sum(axis=-1) * (matches.focal / RESIDUAL_PX) ** 2
        weight = base / (1 + residual)
    confidence = information * matches.focal**2 * (inverse > 0)
    return np.maximum(inverse, 1e-6).astype(np.float32), confidence.astype(np.float32)


def _resect(
    j: int,
    start: np.ndarray,
    points: dict[int, tuple[np.ndarray, np.ndarray]],
    matches: _Matches,
    poses: dict[int, np.ndarray],
) -> np.ndarray:
    """Return w2c [4, 4] of frame j by robust Gauss–Newton on the reprojection of the other frames' points."""
    worlds, sights, weights = [], [], []
    for i in matches.partners(j, poses):
        inverse, confidence = points[i]
        if i == j:
            continue
        local = (matches.rays / inverse[..., None]).reshape(-1, 3)
        c2w = np.linalg.inv(poses[i])
        worlds.append(local @ c2w[:3, :3].T + c2w[:3, 3])
        sights.append(matches.seen[i, j].reshape(-1, 2))
        weights.append((matches.weights[i, j] * (confidence > np.median(confidence) * 0.05)).ravel())
    if not worlds:
        raise BadSample("no_parallax", f"frame {j} shares no points with the frames whose camera is known")
    world, sight, base = np.concatenate(worlds), np.concatenate(sights), np.concatenate(weights)
    pose = start.copy()
    for _ in range(8):
        local = world @ pose[:3, :3].T + pose[:3, 3]
        z = np.maximum(local[:, 2], 1e-3)
        x, y = local[:, 0] / z, local[:, 1] / z
        error = np.stack([sight[:, 0] - x, sight[:, 1] - y])
        squared = np.square(error).sum(axis=0) * (matches.focal / RESIDUAL_PX) ** 2
        weight = np.where(local[:, 2] > 1e-3, base / (1 + squared), 0)
        zero = np.zeros_like(x)
        jacobian = np.stack(
            [[1 / z, zero, -x / z, -x * y, 1 + x * x, -y], [zero, 1 / z, -y / z, -1 - y * y, x * y, x]]
        )  # [2, 6, n]: shift, turn
        weighted = jacobian * weight
        normal = np.einsum("kan,kbn->ab", weighted, jacobian) + 1e-9 * np.eye(6)
        step = np.linalg.solve(normal, np.einsum("kan,kn->a", weighted, error))
        change = np.eye(4)
        change[:3, :3], change[:3, 3] = Rotation.from_rotvec(step[3:]).as_matrix(), step[:3]
        pose = change @ pose
        if np.abs(step).max() < 1e-5:
            break
    return pose


def _fuse(
    i: int, views: list[tuple[np.ndarray, np.ndarray]], flows: Flows, weights: Flows, rays: np.ndarray, poses: dict
) -> np.ndarray:
    """Return 1/z float32 [H, W] > 0 of frame i: its own estimate and its neighbours', joined, the gaps filled."""
    inverse, confidence = views[i]
    estimates, votes = [inverse], [confidence]
    for a, j in flows:
        if a != i:
            continue
        relative = (poses[i] @ np.linalg.inv(poses[j])).astype(np.float32)
        there = (rays / views[j][0][..., None]) @ relative[2, :3] + relative[2, 3]
        seen = sample(np.stack([there, views[j][1]], axis=-1), flows[i, j])
        good = seen[..., 0] > 1e-6
        estimates.append(np.where(good, 1 / np.where(good, seen[..., 0], 1), 1).astype(np.float32))
        votes.append(np.where(good, seen[..., 1] * weights[i, j], 0))
    joined, vote = _weighted_median(np.stack(estimates), np.stack(votes))
    return _fill(joined, vote)


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (weighted median over axis 0, sum of the weights)."""
    order = np.argsort(values, axis=0, kind="stable")
    sorted_weights = np.take_along_axis(weights, order, axis=0)
    running = np.cumsum(sorted_weights, axis=0)
    middle = np.argmax(running >= 0.5 * running[-1], axis=0)
    return np.take_along_axis(np.take_along_axis(values, order, axis=0), middle[None], axis=0)[0], running[-1]


def _fill(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return values smoothed by their weights; where little is known, a wider and wider surrounding decides."""
    import cv2

    reference = np.median(weights[weights > 0]) if (weights > 0).any() else 0.0
    if reference == 0:
        raise BadSample("no_parallax", "no pixel of a frame has a consistent depth")
    weight = np.minimum(weights / reference, 1.0).astype(np.float32)
    limits = np.percentile(values[weight > 0.1], [1, 99]) if (weight > 0.1).any() else (values.min(), values.max())
    values = np.clip(values, *limits)
    top, bottom = np.zeros_like(values), np.zeros_like(values)
    for level in range(7):
        size = 2 * 2**level + 1
        blur_weight = cv2.blur(weight, (size, size))
        share = 0.02**level if level else 1.0  # a wider window counts only where the narrower are empty
        top += share * cv2.blur(values * weight, (size, size))
        bottom += share * blur_weight
    known = bottom > 0
    filled = np.where(known, top / np.where(known, bottom, 1), np.median(values[weight > 0]))
    return filled.astype(np.float32)
