"""Bundle adjustment of dense flow: cameras, focal length and inverse depths of a grid of points, solved jointly.

A point at pixel x of frame i (x measured from the picture's centre) with inverse depth q = 1/z is seen by frame j at
f · (R d + q t), with d = (x/f, y/f, 1) and (R, t) the motion from i to j. Every point belongs to one frame, so the
depths are eliminated one by one (Schur complement), and the system to solve has only the size of the cameras.
Levenberg–Marquardt with Cauchy weights; the variable is log q, so that every point stays in front of its camera.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from ex4d.geometry.camera import invert

SCALE_PX = 0.5  # of the Cauchy weights
MIN_Z = 0.05  # least z of a point in the other camera, in units of its z in its own
FOCAL_STEP, DEPTH_STEP = 0.2, 1.0  # largest change of the logarithms of focal length and depth in one step
FARTHEST = 30.0  # largest depth of a point, in median depths
# Weight of log(focal / usual)² in the cost: negligible if the flow determines the focal length, decisive otherwise.
FOCAL_PRIOR = 0.04


@dataclass(frozen=True)
class Matches:
    """N points of every frame, tracked to other frames: P ordered pairs of frames.

    Args:
        places: float64 [T, N, 2] px of the points of every frame, from the picture's centre.
        pairs: int64 [P, 2], (i, j).
        targets: float64 [P, N, 2] px, where frame i's points lie in frame j.
        weights: float64 [P, N], 0 to 1.
    """

    places: np.ndarray
    pairs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.places)

    def among(self, frames: list[int]) -> Matches:
        """Return the matches whose two frames are both in `frames`."""
        return self.only(np.asarray(np.isin(self.pairs, frames).all(axis=1)))

    def only(self, keep: np.ndarray) -> Matches:
        """Return the matches of the pairs that bool [P] selects."""
        return replace(self, pairs=self.pairs[keep], targets=self.targets[keep], weights=self.weights[keep])

    def rays(self, focal: float) -> np.ndarray:
        """Return the points' rays float64 [T, N, 3], z = 1."""
        return np.concatenate([self.places / focal, np.ones((*self.places.shape[:2], 1))], axis=2)


@dataclass(frozen=True)
class Bundle:
    """Cameras and points that explain the flow.

    Args:
        w2c: float64 [T, 4, 4].
        focal: px.
        inverse: float64 [T, N], 1/z of the grid's points.
        information: float64 [T, N], squared px of motion for one unit of `inverse`; 0 where nothing is known.
        cost: weighted mean of log(1 + (residual / SCALE_PX)²).
    """

    w2c: np.ndarray
    focal: float
    inverse: np.ndarray
    information: np.ndarray
    cost: float = np.inf

    @property
    def residual_px(self) -> float:
        """Robust mean of the residual, px."""
        return SCALE_PX * float(np.sqrt(np.expm1(self.cost)))


def adjust(
    matches: Matches, start: Bundle, num_steps: int = 20, usual_focal: float | None = None, fixed_points: bool = False
) -> Bundle:
    """Run Levenberg–Marquardt from `start`.

    Args:
        num_steps: maximum number of steps that lower the cost.
        usual_focal: px; prior of the focal length, deviation from which adds to the cost. None: it is fixed.
        fixed_points: keep the inverse depths of `start` and optimise only the cameras.
    """
    current, damping = replace(start, cost=cost_of(matches, start, usual_focal)), 1e-3
    for _ in range(num_steps):
        system = _system(matches, current, usual_focal, fixed_points)
        for _ in range(6):
            trial = _stepped(matches, current, system, damping, usual_focal is not None)
            trial = replace(trial, cost=cost_of(matches, trial, usual_focal))
            if trial.cost < current.cost:
                break
            damping *= 5
        else:
            break
        damping, gain = max(damping / 5, 1e-7), 1 - trial.cost / current.cost
        current = trial
        if gain < 1e-4:
            break
    return current


def points_of(matches: Matches, bundle: Bundle, frames: list[int] | None = None, num_rounds: int = 4) -> Bundle:
    """Fit the inverse depths to the bundle's cameras, by iteratively reweighted linear least squares.

    Args:
        frames: frames whose points are fitted; None: all.
    """
    inverse, information = bundle.inverse.copy(), bundle.information.copy()
    rays, focal = matches.rays(bundle.focal), bundle.focal
    for i in range(matches.num_frames) if frames is None else frames:
        mine = matches.pairs[:, 0] == i
        motions = bundle.w2c[matches.pairs[mine, 1]] @ invert(bundle.w2c[i])
        seen, base = matches.targets[mine] / focal, matches.weights[mine]
        turned, shift = rays[i] @ motions[:, :3, :3].swapaxes(1, 2), motions[:, None, :3, 3]
        z = np.where(np.abs(turned[..., 2:]) > 1e-6, turned[..., 2:], 1e-6)
        a = (seen * shift[..., 2:] - shift[..., :2]) / z * focal
        b = (turned[..., :2] - seen * z) / z * focal
        weight = base
        for _ in range(num_rounds):
            squares = (weight[..., None] * a * a).sum(axis=(0, 2))
            inverse[i] = (weight[..., None] * a * b).sum(axis=(0, 2)) / np.maximum(squares, 1e-9)
            weight = base / (1 + np.square(inverse[i][:, None] * a - b).sum(axis=2) / SCALE_PX**2)
        information[i] = squares
    return replace(bundle, inverse=inverse, information=information)


def forward(bundle: Bundle) -> Bundle:
    """Move every point in front of its camera; if most lie behind, mirror the bundle first.

    Negating all shifts and all inverse depths leaves the predicted flow unchanged.
    """
    known = bundle.information > 0
    middle = float(np.median(bundle.inverse[known])) if known.any() else 1.0
    w2c = bundle.w2c.copy()
    w2c[:, :3, 3] *= np.sign(middle) or 1.0
    inverse = np.sign(middle) * bundle.inverse if middle else bundle.inverse
    return replace(bundle, w2c=w2c, inverse=np.maximum(inverse, max(abs(middle), 1e-9) / FARTHEST))


def normal(bundle: Bundle, first: int = 0) -> Bundle:
    """Normalise the bundle: world = the camera `first`, median inverse depth 1."""
    known = bundle.information > 0
    scale = float(np.median(np.abs(bundle.inverse[known]))) if known.any() else 1.0
    w2c = bundle.w2c @ invert(bundle.w2c[first])
    w2c[:, :3, 3] *= scale
    return replace(bundle, w2c=w2c, inverse=bundle.inverse / scale, information=bundle.information * scale**2)


def cost_of(matches: Matches, bundle: Bundle, usual_focal: float | None = None) -> float:
    """Return the weighted mean of log(1 + (residual / SCALE_PX)²), plus the prior of the focal length."""
    squared = squared_residuals(matches, bundle)
    cost = float((matches.weights * np.log1p(squared / SCALE_PX**2)).sum() / max(matches.weights.sum(), 1e-9))
    return cost if usual_focal is None else cost + FOCAL_PRIOR * float(np.log(bundle.focal / usual_focal)) ** 2


def squared_residuals(matches: Matches, bundle: Bundle) -> np.ndarray:
    """Return float64 [P, N]: squared distance in px between the observed and the predicted points."""
    return np.square(_predicted(matches, bundle)[2]).sum(axis=-1)


def _predicted(matches: Matches, bundle: Bundle) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (motions [P, 4, 4] from i to j, points [P, N, 3] in j times their 1/z in i, residuals [P, N, 2] px)."""
    i, j = matches.pairs.T
    motions = bundle.w2c[j] @ invert(bundle.w2c[i])
    turned = matches.rays(bundle.focal)[i] @ motions[:, :3, :3].swapaxes(1, 2)
    there = turned + bundle.inverse[i][..., None] * motions[:, None, :3, 3]
    return motions, there, matches.targets - bundle.focal * there[..., :2] / np.maximum(there[..., 2:], MIN_Z)


@dataclass(frozen=True)
class _System:
    """Normal equations: six parameters per camera, a left increment (shift, turn), then log focal.

    H [6T + 1, 6T + 1], g [6T + 1]: cameras; own, right [T, N]: diagonal and right-hand side of the points; mixed: for
    each frame (columns of H, [N, columns]), the coupling of its points with the cameras that see them.
    """

    H: np.ndarray
    g: np.ndarray
    own: np.ndarray
    right: np.ndarray
    mixed: list[tuple[np.ndarray, np.ndarray]]


def _jacobians(matches: Matches, bundle: Bundle) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return J [P, N, 2, 13] by cameras i, j, log focal; [P, N, 2] by log q; residual [P, N, 2]; weight [P, N]."""
    i, _ = matches.pairs.T
    focal, num_pairs, num = bundle.focal, len(matches.pairs), matches.places.shape[1]
    motions, there, residual = _predicted(matches, bundle)
    weight = matches.weights / (1 + np.square(residual).sum(axis=-1) / SCALE_PX**2) * (there[..., 2] > MIN_Z)
    x, y, z = np.moveaxis(there, -1, 0)
    z = np.maximum(z, MIN_Z)
    projection = np.zeros((num_pairs, num, 2, 3))  # image position by point
    projection[..., 0, 0] = projection[..., 1, 1] = focal / z
    projection[..., :, 2] = -focal * there[..., :2] / (z**2)[..., None]
    cross = np.zeros((num_pairs, num, 3, 3))  # point by turn
    cross[..., 0, 1], cross[..., 0, 2], cross[..., 1, 2] = z, -y, x
    cross[..., 1, 0], cross[..., 2, 0], cross[..., 2, 1] = -z, y, -x
    J = np.empty((num_pairs, num, 2, 13))
    J[..., 6:9] = projection * bundle.inverse[i][..., None, None]
    J[..., 9:12] = projection @ cross
    J[..., :6] = -J[..., 6:12] @ _adjoints(motions)[:, None]
    flat = matches.rays(focal)[i] * (1, 1, 0)
    bent = flat @ motions[:, :3, :3].swapaxes(1, 2)
    J[..., 12] = focal * there[..., :2] / z[..., None] - (projection @ bent[..., None])[..., 0]
    by_q = (projection @ motions[:, None, :3, 3:])[..., 0] * bundle.inverse[i][..., None]
    return J, by_q, residual, weight


def _adjoints(motions: np.ndarray) -> np.ndarray:
    """Return [P, 6, 6]: maps an increment of the camera i to one of the motion from i to j."""
    rotation, (x, y, z) = motions[:, :3, :3], np.moveaxis(motions[:, :3, 3], -1, 0)
    zero = np.zeros_like(x)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(-1, 3, 3)
    adjoint = np.zeros((len(motions), 6, 6))
    adjoint[:, :3, :3] = adjoint[:, 3:, 3:] = rotation
    adjoint[:, :3, 3:] = skew @ rotation
    return adjoint


def _system(matches: Matches, bundle: Bundle, usual_focal: float | None, fixed_points: bool) -> _System:
    num_frames, num = matches.places.shape[:2]
    size = 6 * num_frames + 1
    J, by_q, residual, weight = _jacobians(matches, bundle)
    if usual_focal is None:
        J[..., 12] = 0
    if fixed_points:
        by_q = np.zeros_like(by_q)
    weighted = J * weight[..., None, None]
    flat = weighted.reshape(len(J), -1, 13).swapaxes(1, 2)
    blocks = flat @ J.reshape(len(J), -1, 13)
    sides = (flat @ residual.reshape(len(J), -1, 1))[..., 0]
    mixed = (weighted * by_q[..., None]).sum(axis=2)  # [P, N, 13]
    H, g = np.zeros((size, size)), np.zeros(size)
    own, right = np.zeros((num_frames, num)), np.zeros((num_frames, num))
    links: list[tuple[np.ndarray, np.ndarray]] = []
    for i in range(num_frames):
        mine = np.flatnonzero(matches.pairs[:, 0] == i)
        partners = matches.pairs[mine, 1]
        link = np.zeros((num, 6 * len(mine) + 7))
        for place, (p, j) in enumerate(zip(mine, partners, strict=True)):
            columns = np.r_[6 * i : 6 * i + 6, 6 * j : 6 * j + 6, size - 1]
            H[np.ix_(columns, columns)] += blocks[p]
            g[columns] += sides[p]
            link[:, :6] += mixed[p, :, :6]
            link[:, 6 * place + 6 : 6 * place + 12] = mixed[p, :, 6:12]
            link[:, -1] += mixed[p, :, 12]
        links.append((np.concatenate([np.arange(6 * k, 6 * k + 6) for k in (i, *partners)] + [[size - 1]]), link))
        own[i] = (weight[mine] * np.square(by_q[mine]).sum(axis=-1)).sum(axis=0)
        right[i] = (weight[mine] * (by_q[mine] * residual[mine]).sum(axis=-1)).sum(axis=0)
    if usual_focal is not None:
        prior = FOCAL_PRIOR * matches.weights.sum() * SCALE_PX**2
        H[-1, -1] += prior
        g[-1] -= prior * float(np.log(bundle.focal / usual_focal))
    return _System(H, g, own, right, links)


def _stepped(matches: Matches, bundle: Bundle, system: _System, damping: float, free_focal: bool) -> Bundle:
    """Return the bundle after one damped step."""
    size, num_frames = len(system.g), matches.num_frames
    damped = system.own * (1 + damping) + 1e-6 * system.own.mean() + 1e-12
    S = system.H + np.diag(damping * np.diag(system.H) + 1e-9 * np.trace(system.H) / size + 1e-12)
    right = system.g.copy()
    for i, (columns, link) in enumerate(system.mixed):
        scaled = link / damped[i][:, None]
        S[np.ix_(columns, columns)] -= link.T @ scaled
        right[columns] -= scaled.T @ system.right[i]
    seen = np.diag(system.H)[: size - 1].reshape(num_frames, 6).sum(axis=1) > 0
    free = np.flatnonzero(np.append(np.repeat(seen, 6), free_focal))
    step = np.zeros(size)
    step[free] = np.linalg.solve(S[np.ix_(free, free)], right[free])
    moved = np.stack([link @ step[columns] for columns, link in system.mixed])
    change = np.tile(np.eye(4), (num_frames, 1, 1))
    parts = step[:-1].reshape(num_frames, 6)
    change[:, :3, :3], change[:, :3, 3] = Rotation.from_rotvec(parts[:, 3:]).as_matrix(), parts[:, :3]
    focal = bundle.focal * float(np.exp(np.clip(step[-1], -FOCAL_STEP, FOCAL_STEP)))
    inverse = bundle.inverse * np.exp(np.clip((system.right - moved) / damped, -DEPTH_STEP, DEPTH_STEP))
    return Bundle(change @ bundle.w2c, focal, inverse, system.own / inverse**2)
