"""Estimate the cameras of a clip from its optical flow: whether the camera rests, turns or moves, and its path.

A camera that moves little and mostly turns leaves a two-fold ambiguity: near and far exchanged, with the opposite
motion and another turn, give nearly the same flow. The two differ only by the perspective of the lens. So both are
tried, from several focal lengths, each refined by bundle adjustment, and the one of the least cost is kept. The cost of
its best rival measures how certain that is (`Found.certainty`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from ex4d.depth import bundle as bundles
from ex4d.depth.bundle import Bundle, Matches
from ex4d.errors import Filtered
from ex4d.geometry.camera import FOV_DEG, invert

FOVS_DEG = (45.0, 65.0)  # over the longer side: start values of the search for the focal length
FOV_RANGE_DEG = (20.0, 110.0)
WINDOW = 13  # frames around the first pair on which the hypotheses are compared
MIN_PARALLAX_PX = 0.5  # displacement that a turning camera does not explain
# A pure turn explains a fifth of the points to within the noise of the flow, whatever bodies move in front of it; a
# translation leaves larger residuals nearly everywhere in the picture. Measured in docs/decisions/source_cameras.md.
UNEXPLAINED_PX, EXPLAINED_SHARE, MIN_CELLS, CELLS = 0.35, 0.2, 0.75, 4
# With smaller residuals, a translation must explain the flow (largest cost) and most points must support it (least
# share): their residual under a pure turn exceeds ASKS_PX, and ASKS_RATIO × that under the translation.
MAX_COST, MIN_SUPPORT, ASKS_PX, ASKS_RATIO, NOISE_PX = 0.5, 0.45, 0.4, 2.0, 0.15
ENOUGH_PARALLAX_PX = 8.0  # more does not make a better first pair
MIN_SHARE = 0.3  # least share of points with consistent flow
KNOWN = 0.1  # fraction of the median information below which a point's depth is unknown
FAR, MAX_BEHIND = 0.05, 0.3  # points below this × the median inverse depth count as behind the camera; largest share
SAME = 0.3  # correlation of the inverse depths of two solutions below which they contradict each other


@dataclass(frozen=True)
class Found:
    """The cameras found for a clip whose camera moves.

    Args:
        bundle: cameras, focal length and points; world = the first frame's camera, median inverse depth 1.
        certainty: cost of the best contradicting solution / cost of this one; inf if there was none.
    """

    bundle: Bundle
    certainty: float


def no_parallax(parallax_px: float, why: str) -> Filtered:
    """Return the error for a clip whose camera does not move, or whose motion cannot be found."""
    return Filtered("no_parallax", parallax_px, MIN_PARALLAX_PX, why)


def focal_of(size: tuple[int, int], fov_deg: float) -> float:
    """Return the focal length in px of a field of view over the longer side."""
    return 0.5 * max(size) / float(np.tan(np.radians(fov_deg) / 2))


def find(matches: Matches, size: tuple[int, int], fov_deg: float | None = None) -> Found:
    """Find the cameras that explain the flow best.

    Args:
        size: (H, W) px.
        fov_deg: field of view over the longer side, if known; None: it is estimated.

    Raises:
        Filtered: no_parallax; the score is the displacement in px that a turning camera does not explain.
    """
    usual = focal_of(size, fov_deg or FOV_DEG)
    turned = turning(matches, usual, fov_deg is None)
    pairs = first_pairs(matches, usual)
    first = max(0, min(sum(pairs[0]) // 2 - WINDOW // 2, matches.num_frames - WINDOW))
    window = list(range(first, min(matches.num_frames, first + WINDOW)))
    inside = [pair for pair in pairs if set(pair) <= set(window)]
    near = matches.among(window)
    solutions = []
    for number, start_deg in enumerate(FOVS_DEG):
        pair, focal = inside[number % len(inside)], focal_of(size, fov_deg or start_deg)
        for sign in (1.0, -1.0):
            solution = bundles.adjust(near, _grown(near, _two_views(near, pair, focal, sign), list(pair), window))
            if fov_deg is None:
                solution = bundles.adjust(near, solution, 30, usual)
            solution = bundles.normal(solution, window[0])
            if _plausible(solution, window, size):
                solutions.append(solution)
    if not solutions:
        raise no_parallax(0.0, "no motion of the camera explains the flow")
    solutions.sort(key=lambda solution: solution.cost)
    best = solutions[0]
    if not moves_everywhere(matches, turned) and not _is_supported(near, turned, best):
        raise no_parallax(pairs[0][1], "a camera that only turns explains the motion, but for what moves by itself")
    rivals = [solution.cost for solution in solutions[1:] if _agreement(best, solution, window) < SAME]
    certainty = min(rivals) / max(best.cost, 1e-9) if rivals else np.inf
    everywhere = list(range(matches.num_frames))
    whole = bundles.adjust(matches, _grown(matches, best, window, everywhere), 10)
    if fov_deg is None:
        whole = bundles.adjust(matches, whole, 10, usual)
    return Found(bundles.normal(whole), float(certainty))


def turning(matches: Matches, focal: float, seek_focal: bool = True) -> Bundle:
    """Fit the cameras of a clip under the assumption that the camera only turns about its centre: every point is far.

    Args:
        focal: px, the start of the search for the focal length; fixed unless `seek_focal`.
    """
    w2c = np.tile(np.eye(4), (matches.num_frames, 1, 1))
    for k in range(1, matches.num_frames):
        number = int(np.flatnonzero((matches.pairs == (k - 1, k)).all(axis=1))[0])
        rays, target_rays = matches.rays(focal)[k - 1], _as_rays(matches.targets[number] / focal)
        w2c[k, :3, :3] = _turn(rays, target_rays, matches.weights[number]) @ w2c[k - 1, :3, :3]
    nothing = np.zeros(matches.places.shape[:2])
    return bundles.adjust(matches, Bundle(w2c, focal, nothing + 1e-9, nothing), 30, focal if seek_focal else None)


def moves_everywhere(matches: Matches, turned: Bundle) -> bool:
    """Return whether a camera that only turns (`turned`) leaves the flow of nearly the whole picture unexplained.

    Most of the picture must agree, over the pairs of frames farthest apart, so that moving bodies cannot decide it.
    """
    gaps = matches.pairs[:, 1] - matches.pairs[:, 0]
    wide = gaps == gaps.max()
    residual, weights = np.sqrt(bundles.squared_residuals(matches, turned)[wide]), matches.weights[wide]
    trusted = residual[weights > 0.5]
    if not trusted.size or np.percentile(trusted, 100 * EXPLAINED_SHARE) < UNEXPLAINED_PX:
        return False
    column, row = (_bins(matches.places[0][:, axis]) for axis in (0, 1))
    cell = np.broadcast_to(row * CELLS + column, weights.shape).ravel()
    total = np.bincount(cell, weights.ravel(), CELLS**2)
    moved = np.bincount(cell, (weights * (residual > MIN_PARALLAX_PX)).ravel(), CELLS**2)
    visible = total > 0.1 * total.mean()  # parts that leave the picture say nothing
    return float((moved > 0.5 * total)[visible].mean()) >= MIN_CELLS


def _is_supported(matches: Matches, turned: Bundle, moved: Bundle) -> bool:
    """Return whether the translation of `moved` explains the flow, and enough points support it."""
    gaps = matches.pairs[:, 1] - matches.pairs[:, 0]
    wide, weights = gaps == gaps.max(), matches.weights[gaps == gaps.max()]
    before, after = (np.sqrt(bundles.squared_residuals(matches, bundle)[wide]) for bundle in (turned, moved))
    asks = (before > ASKS_PX) & (before > ASKS_RATIO * np.maximum(after, NOISE_PX))
    share = float((weights * asks).sum() / max(weights.sum(), 1e-9))
    return share >= MIN_SUPPORT and bundles.cost_of(matches, moved) <= MAX_COST


def _bins(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.minimum((CELLS * (values - low) / max(high - low, 1e-9)).astype(int), CELLS - 1)


def first_pairs(matches: Matches, focal: float) -> list[tuple[int, int]]:
    """Return the pairs (i, j) of frames with a large, consistent parallax, best first. Filtered if none has it."""
    pairs, largest = [], 0.0
    for number, (i, j) in enumerate(matches.pairs):
        keep = matches.weights[number] > 0.5
        if j < i or keep.mean() < MIN_SHARE or keep.sum() < 32:
            continue
        rays, seen = matches.rays(focal)[i][keep], matches.targets[number][keep] / focal
        turned = rays @ _turn(rays, _as_rays(seen), matches.weights[number][keep]).T
        residual = np.linalg.norm(seen - turned[:, :2] / turned[:, 2:], axis=1) * focal
        parallax = float(np.percentile(residual, 80))
        largest = max(largest, parallax)
        if parallax > MIN_PARALLAX_PX:
            pairs.append((min(parallax, ENOUGH_PARALLAX_PX) * keep.mean(), (int(i), int(j))))
    if not pairs:
        raise no_parallax(largest, "a camera that only turns explains the motion")
    return [pair for _, pair in sorted(pairs, reverse=True)]


def _as_rays(places: np.ndarray) -> np.ndarray:
    return np.concatenate([places, np.ones((len(places), 1))], axis=1)


def _turn(rays: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the rotation [3, 3] that aligns rays with their targets, both [N, 3], robustly (least absolute angles)."""
    rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    targets = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    weight = weights
    for _ in range(6):
        rotation, _ = Rotation.align_vectors(targets, rays, np.maximum(weight, 1e-9))
        weight = weights / np.maximum(np.linalg.norm(targets - rotation.apply(rays), axis=1), 1e-4)
    return rotation.as_matrix()


def _two_views(matches: Matches, pair: tuple[int, int], focal: float, sign: float) -> Bundle:
    """Return one of the two hypotheses (`sign`): a bundle with the cameras of `pair`, the first the identity.

    The best turn absorbs the mean depth: the remaining flow determines 1/z only up to a shift and up to its sign. The
    shift is chosen so that all points lie in front of the camera, and the turn is changed to match.
    """
    i, j = pair
    number = int(np.flatnonzero((matches.pairs == pair).all(axis=1))[0])
    rays, weights = matches.rays(focal)[i], matches.weights[number]
    targets = _as_rays(matches.targets[number] / focal)
    turn = _turn(rays, targets, weights)
    # x' · (t × R d) = 0 for every match: the direction of t is the least eigenvector, robustly.
    planes, weight = np.cross(rays @ turn.T, targets), weights
    for _ in range(6):
        shift = np.linalg.eigh((planes * weight[:, None]).T @ planes)[1][:, 0]
        weight = weights / (1 + np.square(planes @ shift * focal / bundles.SCALE_PX))
    w2c = np.tile(np.eye(4), (matches.num_frames, 1, 1))
    w2c[j, :3, :3], w2c[j, :3, 3] = turn, sign * shift
    empty = np.zeros((matches.num_frames, len(rays)))
    both = matches.among([i, j])
    solution = bundles.points_of(both, Bundle(w2c, focal, empty + 1, empty), [i], 1)
    known = (weights > 0.3) & (solution.information[i] > KNOWN * np.median(solution.information[i]))
    least = float(np.percentile(solution.inverse[i][known], 2)) if known.any() else 0.0
    w2c[j, :3, :3] = _turn(rays, rays @ turn.T + min(0.0, 1.5 * least) * w2c[j, :3, 3], weights)
    solution = bundles.forward(bundles.points_of(both, replace(solution, w2c=w2c), [i, j]))
    return bundles.normal(bundles.adjust(both, solution, 10), i)


def _grown(matches: Matches, start: Bundle, posed: list[int], frames: list[int]) -> Bundle:
    """Extend the bundle to the cameras of all `frames`, each resected from the points of those already posed."""
    grown, posed = start, list(posed)
    while len(posed) < len(frames):
        missing = [k for k in frames if k not in posed]
        new = min(missing, key=lambda k: min(abs(k - i) for i in posed))
        nearest = min(posed, key=lambda i: abs(i - new))
        w2c = grown.w2c.copy()
        w2c[new] = _resected(matches, grown, new, w2c[nearest], posed)
        posed.append(new)
        among = matches.among(posed)
        linked = sorted({int(i) for i, j in among.pairs if j == new} | {new})
        grown = bundles.points_of(among, replace(grown, w2c=w2c), linked)
        grown = replace(grown, inverse=np.maximum(grown.inverse, 1 / bundles.FARTHEST))
    return grown


def _resected(matches: Matches, bundle: Bundle, new: int, start: np.ndarray, posed: list[int]) -> np.ndarray:
    """Resect w2c [4, 4] of a frame by robust Gauss–Newton on the reprojection of the posed frames' points."""
    numbers = [p for p, (i, j) in enumerate(matches.pairs) if j == new and i in posed]
    if not numbers:
        raise no_parallax(0.0, f"frame {new} shares no points with the frames whose camera is known")
    sources = matches.pairs[numbers, 0]
    inverse, information = bundle.inverse[sources], bundle.information[sources]
    usable = (inverse > 1e-3) & (information > 0.5 * KNOWN * np.median(information))
    local = matches.rays(bundle.focal)[sources] / np.where(usable, inverse, 1.0)[..., None]
    c2w = invert(bundle.w2c[sources])
    world = (local @ c2w[:, :3, :3].swapaxes(1, 2) + c2w[:, None, :3, 3])[usable]
    sight, base = (matches.targets[numbers] / bundle.focal)[usable], matches.weights[numbers][usable]
    pose = start.copy()
    for _ in range(10):
        there = world @ pose[:3, :3].T + pose[:3, 3]
        z = np.maximum(there[:, 2], 1e-3)
        x, y = there[:, 0] / z, there[:, 1] / z
        error = np.stack([sight[:, 0] - x, sight[:, 1] - y])
        squared = np.square(error).sum(axis=0) * (bundle.focal / bundles.SCALE_PX) ** 2
        weight = np.where(there[:, 2] > 1e-3, base / (1 + squared), 0)
        zero = np.zeros_like(x)
        jacobian = np.stack(
            [[1 / z, zero, -x / z, -x * y, 1 + x * x, -y], [zero, 1 / z, -y / z, -1 - y * y, x * y, x]]
        )  # [2, 6, n]: shift, turn
        weighted = jacobian * weight
        matrix = np.einsum("kan,kbn->ab", weighted, jacobian) + 1e-9 * np.eye(6)
        step = np.linalg.solve(matrix, np.einsum("kan,kn->a", weighted, error))
        change = np.eye(4)
        change[:3, :3], change[:3, 3] = Rotation.from_rotvec(step[3:]).as_matrix(), step[:3]
        pose = change @ pose
        if np.abs(step).max() < 1e-5:
            break
    return pose


def known_points(bundle: Bundle) -> np.ndarray:
    """Return bool [T, N]: points whose depth the flow determines."""
    there = bundle.information > 0
    return there & (bundle.information > KNOWN * np.median(bundle.information[there])) if there.any() else there


def _plausible(bundle: Bundle, frames: list[int], size: tuple[int, int]) -> bool:
    known = known_points(bundle)[frames]
    if not known.any() or not np.isfinite(bundle.cost):
        return False
    behind = float((bundle.inverse[frames][known] < FAR).mean())
    fov_deg = 2 * np.degrees(np.arctan(0.5 * max(size) / bundle.focal))
    return behind < MAX_BEHIND and FOV_RANGE_DEG[0] < fov_deg < FOV_RANGE_DEG[1]


def _agreement(a: Bundle, b: Bundle, frames: list[int]) -> float:
    """Return the correlation of the inverse depths of two solutions."""
    known = known_points(a)[frames] & known_points(b)[frames]
    if known.sum() < 16:
        return 0.0
    first, second = (np.clip(bundle.inverse[frames][known], -1, 5) for bundle in (a, b))
    return float(np.corrcoef(first, second)[0, 1]) if min(first.std(), second.std()) > 1e-9 else 0.0
