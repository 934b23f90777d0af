"""Depth from a moving camera by classical geometry: no weights, for laptops and tests; for quality, use a network.

Optical flow (DIS) between frames 1, 2, 4 apart → cameras and focal length by bundle adjustment (`depth.cameras`) →
inverse depth of every pixel, by least squares over all its flows (weights: forward–backward consistency and the
epipolar residual) → fusion with the estimates of neighbouring frames for the same point → gaps filled from their
surroundings → all of it repeated twice, with flow measured again from the positions that the result predicts →
independently moving bodies placed on the surface below them (`depth.moving`).

It needs a camera that moves sideways or forward. A clip whose camera rests or only turns is filtered (no_parallax), as
is one that an inside-out scene explains as well (parallax_certainty), or a clip of noise (parallax_noise). The scale is
arbitrary: the median depth of the clip is 1. Everything runs in one thread and is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ex4d.depth import DepthRequest, Geometry, moving
from ex4d.depth import bundle as bundles
from ex4d.depth import cameras as camera_search
from ex4d.depth.bundle import MIN_Z, Bundle, Matches
from ex4d.errors import Filtered
from ex4d.geometry.camera import FOV_DEG, invert, pixel_rays
from ex4d.geometry.tracks import Flows, measure_again, one_thread, pair_flows, sample, trust

GAPS = (1, 2, 4)
MIN_MOTION_PX = 0.3  # below it DIS measures noise (its median error is 0.15–0.3 px)
MAX_STILL_SHARE = 0.4  # of the textured pixels; above it the camera is at rest
# A pixel has texture if its Sobel gradient reaches TEXTURE; a smaller share of them says nothing about the camera.
TEXTURE, MIN_TEXTURED = 8.0, 0.1
# Correlation of a frame with the next one, warped to it by the flow: 0.93 and above for clips, 0.1 to 0.62 for noise.
MIN_LIKENESS = 0.75
# Cost of the best contradicting solution / cost of the best; recorded up to the largest.
MIN_CERTAINTY, MAX_CERTAINTY = 1.02, 100.0
RESIDUAL_PX = 0.5  # scale of the Cauchy weights
WORST = 400.0  # cap of the squared residual, in that scale
# Rounds that measure the flow again from the predicted positions, and steps of each. One round halves the errors of
# depth and turn; a second one removes a third of the rest (docs/decisions/source_cameras.md).
NUM_AGAIN, NUM_STEPS = 2, 30
GRID = 16  # points along the shorter side from which cameras are found


def estimate(frames: np.ndarray, request: DepthRequest) -> Geometry:
    """Estimate z_depth float32 [T, H, W] of arbitrary scale (median 1 over the clip) from frames uint8 [T, H, W, 3].

    Raises:
        Filtered: no_parallax, if the camera does not move, only turns, or its motion cannot be found;
            parallax_certainty, if a contradicting solution explains the flow as well; parallax_noise, if the flow does
            not map frames to their neighbours; parallax_moving, if most of the picture moves by itself.
    """
    num_frames, height, width = frames.shape[:3]
    if num_frames < 2:
        raise camera_search.no_parallax(0.0, "one frame has no parallax")
    with one_thread():
        flows = pair_flows(frames, GAPS)
        _check_motion(frames, flows)
        weights = trust(flows)
        cameras = camera_search.find(matches_of(flows, weights), (height, width), request.fov_deg)
        if cameras.certainty < MIN_CERTAINTY:
            why = "near and far could be exchanged: the clip turns too much for its parallax"
            raise Filtered("parallax_certainty", cameras.certainty, MIN_CERTAINTY, why)
        bundle, inverse, mask = refined(frames, flows, cameras.bundle, request.fov_deg)
        inverse = moving.place(inverse, mask)
    w2c, focal = bundle.w2c, bundle.focal
    K = _intrinsics((height, width), focal)
    values = (1.0 / inverse).astype(np.float32)
    middle = float(np.median(values))
    values, w2c = values / np.float32(middle), w2c.copy()
    w2c[:, :3, 3] /= middle
    fov_deg = 2 * float(np.degrees(np.arctan(0.5 * max(height, width) / focal)))
    facts = {
        "estimator": "parallax",
        "fov_deg": fov_deg,
        "residual_px": bundle.residual_px,
        "certainty": min(cameras.certainty, MAX_CERTAINTY),
        "moving_share": float(mask.mean()),
    }
    return Geometry(values, "z_depth", K, False, facts, w2c, None, mask)


def _check_motion(frames: np.ndarray, flows: Flows) -> None:
    """Raise Filtered unless the flow is that of a moving camera.

    no_parallax: too little of the picture has texture, or much of the texture does not move in any pair of frames, so
    that the camera is at rest. parallax_noise: the flow does not map frames to their neighbours.
    """
    import cv2

    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in frames]
    slopes = [np.abs(cv2.Sobel(g, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(g, cv2.CV_32F, 0, 1)) for g in gray]
    textured = [slope >= max(TEXTURE, float(np.median(slope))) for slope in slopes]
    share = float(np.mean([(slope >= TEXTURE).mean() for slope in slopes]))
    if share < MIN_TEXTURED:
        raise Filtered("no_parallax", share, MIN_TEXTURED, "too little of the picture has texture")
    likeness = float(
        np.median([_likeness(gray[i], sample(gray[i + 1], flows[i, i + 1])) for i in range(len(gray) - 1)])
    )
    if likeness < MIN_LIKENESS:
        raise Filtered(
            "parallax_noise",
            likeness,
            MIN_LIKENESS,
            "neighbouring frames do not match: noise, or too much motion between them",
        )
    widest = max(j - i for i, j in flows)
    still = [
        (np.linalg.norm(flow, axis=-1)[textured[i]] < MIN_MOTION_PX).mean()
        for (i, j), flow in flows.items()
        if j - i == widest and textured[i].any()
    ]
    if min(still, default=1.0) > MAX_STILL_SHARE:
        why = "the camera does not move: too little of the texture does"
        raise Filtered("no_parallax", 1 - min(still, default=1.0), 1 - MAX_STILL_SHARE, why)


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two pictures."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / max(float(a.std() * b.std()), 1e-9))


def matches_of(flows: Flows, weights: Flows) -> Matches:
    """Sample the flows and their weights at a grid of pixels, the same in every frame; weights under 0.05 become 0."""
    pairs = sorted(flows)
    height, width = flows[pairs[0]].shape[:2]
    step = max(1, min(height, width) // GRID)
    cut = (slice(step // 2, None, step), slice(step // 2, None, step))
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2), axis=-1)[cut]
    places = grid.reshape(-1, 2)
    targets = np.stack([places + flows[pair][cut].reshape(-1, 2) for pair in pairs])
    votes = np.stack([weights[pair][cut].ravel() for pair in pairs]).astype(np.float64)
    num_frames = 1 + max(j for _, j in pairs)
    return Matches(np.tile(places, (num_frames, 1, 1)), np.array(pairs), targets, np.where(votes < 0.05, 0, votes))


def _intrinsics(size: tuple[int, ...], focal: float) -> np.ndarray:
    """Return K [3, 3] of a picture (H, W), px, whose principal point is its centre."""
    return np.array([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]])


def induced(inverse: np.ndarray, w2c: np.ndarray, focal: float, pairs: Iterable[tuple[int, int]]) -> Flows:
    """Return the flow float32 [H, W, 2] px that moving cameras induce in a static scene, for each of `pairs` (i, j).

    Args:
        inverse: [T, H, W] > 0, 1/z. w2c: [T, 4, 4], in the unit of z. focal: px.
    """
    size = inverse.shape[1:]
    rays = pixel_rays(size, _intrinsics(size, focal))
    flows: Flows = {}
    for i, j in pairs:
        relative = w2c[j] @ invert(w2c[i])
        there = rays @ relative[:3, :3].T + inverse[i][..., None] * relative[:3, 3]
        seen = there[..., :2] / np.maximum(there[..., 2:], MIN_Z)
        flows[i, j] = np.clip(focal * (seen - rays[..., :2]), -max(size), max(size)).astype(np.float32)
    return flows


def refined(
    frames: np.ndarray, flows: Flows, bundle: Bundle, fov_deg: float | None
) -> tuple[Bundle, np.ndarray, np.ndarray]:
    """Refine a bundle with flow measured again; return (bundle, 1/z float32 [T, H, W], mask of what moves, bool).

    Args:
        flows: the flows to which `bundle` was fitted.

    Raises:
        Filtered: parallax_moving, if most of the picture moves by itself.
    """
    height, width = frames.shape[1:3]
    weights = trust(flows)
    inverse, residual = _dense(bundle, flows, weights)
    mask = moving.find(inverse, residual, flows, weights)  # before the rounds, which also fit bodies better
    usual = None if fov_deg is not None else camera_search.focal_of((height, width), FOV_DEG)
    for _ in range(NUM_AGAIN):
        flows = measure_again(frames, induced(inverse, bundle.w2c, bundle.focal, flows))
        weights = trust(flows)
        matches = matches_of(flows, {(i, j): weights[i, j] * ~mask[i] for i, j in flows})
        near = bundles.forward(bundles.points_of(matches, bundle))
        bundle = bundles.normal(bundles.adjust(matches, near, NUM_STEPS, usual))
        inverse, _ = _dense(bundle, flows, weights)
    return bundle, inverse, mask


def _dense(bundle: Bundle, flows: Flows, weights: Flows) -> tuple[np.ndarray, np.ndarray]:
    """Return (1/z float32 [T, H, W] > 0, residual float32 [T, H, W] px of the flows)."""
    size, frames = next(iter(flows.values())).shape[:2], range(len(bundle.w2c))
    rays = pixel_rays(size, _intrinsics(size, bundle.focal)).astype(np.float32)
    views = [_inverse_depth(i, flows, weights, rays, bundle.w2c, bundle.focal) for i in frames]
    inverse = np.stack([_fuse(i, views, flows, weights, rays, bundle.w2c) for i in frames])
    return inverse, np.stack([_along(i, views, flows, weights) for i in frames])


@dataclass(frozen=True)
class _View:
    """The estimate from one frame's flows: float32 [H, W] each.

    inverse: 1/z > 0. confidence: px² per unit of it. residual: px. weight: sum of the flows' weights.
    """

    inverse: np.ndarray
    confidence: np.ndarray
    residual: np.ndarray
    weight: np.ndarray


def _inverse_depth(i: int, flows: Flows, weights: Flows, rays: np.ndarray, w2c: np.ndarray, focal: float) -> _View:
    """Estimate the inverse depth of frame i from all its flows.

    A point at inverse depth q on the ray d is seen from j at x with R d + q t = s (x, 1): two equations per flow,
    linear in q.
    """
    rows, sights, votes = [], [], []
    for pair in (pair for pair in flows if pair[0] == i):
        relative = (w2c[pair[1]] @ invert(w2c[i])).astype(np.float32)
        turned, shift = rays @ relative[:3, :3].T, relative[:3, 3]
        target_rays = rays[..., :2] + flows[pair] / np.float32(focal)
        rows.append((target_rays * shift[2] - shift[:2]) / turned[..., 2:])
        sights.append((turned[..., :2] - target_rays * turned[..., 2:]) / turned[..., 2:])
        votes.append(weights[pair])
    a, b, base = np.stack(rows), np.stack(sights), np.stack(votes)
    weight = base
    for _ in range(3):
        information = (weight[..., None] * a * a).sum(axis=(0, 3))
        inverse = (weight[..., None] * a * b).sum(axis=(0, 3)) / np.maximum(information, 1e-12)
        squared = np.square(inverse[None, ..., None] * a - b).sum(axis=-1) * (focal / RESIDUAL_PX) ** 2
        weight = base / (1 + squared)
    confidence = information * focal**2 * (inverse > 0)
    # A point cannot lie behind its camera: flow that implies it gets the residual of the closest possible, infinity.
    squared = np.where(inverse > 0, squared, np.square(b).sum(axis=-1) * (focal / RESIDUAL_PX) ** 2)
    total = base.sum(axis=0)
    residual = RESIDUAL_PX * np.sqrt((base * np.minimum(squared, WORST)).sum(axis=0) / np.maximum(total, 1e-3))
    return _View(*(x.astype(np.float32) for x in (np.maximum(inverse, 1e-6), confidence, residual, total)))


def _along(i: int, views: list[_View], flows: Flows, weights: Flows) -> np.ndarray:
    """Average the residual of frame i float32 [H, W] px with that of the same points in neighbouring frames."""
    top, bottom = views[i].residual * views[i].weight, views[i].weight.copy()
    for a, j in flows:
        if a == i:
            there = sample(np.stack([views[j].residual, views[j].weight], axis=-1), flows[i, j])
            top += there[..., 0] * there[..., 1] * weights[i, j]
            bottom += there[..., 1] * weights[i, j]
    return top / np.maximum(bottom, 1e-3)


def _fuse(i: int, views: list[_View], flows: Flows, weights: Flows, rays: np.ndarray, w2c: np.ndarray) -> np.ndarray:
    """Fuse frame i's estimate with those of its neighbours, and fill gaps: 1/z float32 [H, W] > 0."""
    estimates, votes = [views[i].inverse], [views[i].confidence]
    for a, j in flows:
        if a != i:
            continue
        relative = (w2c[i] @ invert(w2c[j])).astype(np.float32)
        there = (rays / views[j].inverse[..., None]) @ relative[2, :3] + relative[2, 3]
        sampled = sample(np.stack([there, views[j].confidence], axis=-1), flows[i, j])
        good = sampled[..., 0] > 1e-6
        estimates.append(np.where(good, 1 / np.where(good, sampled[..., 0], 1), 1).astype(np.float32))
        votes.append(np.where(good, sampled[..., 1] * weights[i, j], 0))
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
    """Smooth values by their weights; where little is known, wider and wider surroundings decide."""
    import cv2

    reference = np.median(weights[weights > 0]) if (weights > 0).any() else 0.0
    if reference == 0:
        raise camera_search.no_parallax(0.0, "no pixel of a frame has a consistent depth")
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
    # A box filter keeps running sums: where all weights are 0, its result is a rounding error of either sign.
    known = bottom > 1e-6
    filled = np.where(known, top / np.where(known, bottom, 1), np.median(values[weight > 0]))
    return np.clip(filled, *limits).astype(np.float32)
