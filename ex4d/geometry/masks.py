"""Simulated masks: what a training sample hides of its own video, so that no second view is ever needed (METHOD §4).

| kind | kept is | lies in |
|---|---|---|
| `visibility` | what a novel camera would see of the source frame: a shadow-map test | the source's pixels, exactly |
| `novel_view` | what the warp to the novel camera fills: the holes of generation | the novel picture |
| `tracking` | what is covered by tracked, visible points of frame 0 | the source's pixels |

Every mask aims at its own share of holes, so that together they span `hole_share`: the extent of the camera path, or
the number of points that are tracked, is searched for it. The share of a mask is that of its fullest frame. Frame 0 is
complete. Everything follows from (seed, index of the mask).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry import tracks, trajectory
from ex4d.geometry.mesh import DWMesh, build
from ex4d.geometry.visibility import erode, erode_all, novel_view, tracking, visibility

__all__ = ["KINDS", "MaskConfig", "MaskSet", "draw", "erode", "novel_view", "tracking", "visibility"]

KINDS = ("visibility", "novel_view", "tracking")
TRACKING = KINDS.index("tracking")
SEARCH_PX = 64  # the extent of a path is searched on pictures of about this size
SEARCH_STEPS = 6
CLOSE_ENOUGH = 0.03  # to the wanted share of holes; the next path is tried where the search ends farther off
DRIFT_CELLS = 4  # the field that decides which points are dropped has so many cells along a side: holes are blobs

# extent in (0, 1], sign ±1, largest angle → keywords of trajectory.build
PATHS: dict[str, Callable[[float, float, float], dict[str, float]]] = {
    "orbit": lambda extent, sign, angle: {"angle_deg": sign * extent * angle},
    "arc": lambda extent, sign, angle: {"angle_deg": sign * extent * angle},
    "crane": lambda extent, sign, angle: {"angle_deg": sign * extent * min(angle, 85.0)},
    "spiral": lambda extent, sign, angle: {"angle_deg": sign * extent * min(angle, 75.0)},
    "lateral": lambda extent, sign, angle: {"angle_deg": extent * min(angle, 75.0)},
    "full": lambda extent, sign, angle: {"angle_deg": extent * angle},
    "dolly": lambda extent, sign, angle: {"distance": 0.95 * extent},
}


@dataclass(frozen=True)
class MaskConfig:
    """How masks are drawn.

    Args:
        num_masks: S, masks for each clip; each is another training sample of the same video.
        visibility, tracking, novel_view: shares of the kinds; drawn for each mask. Where motion is so fast that tracks
            cannot reach the share of holes aimed at, visibility takes their place.
        trajectories: keys of PATHS, tried in random order.
        max_angle_deg: largest angle of a path that turns.
        hole_share: (least, most) share of holes in a mask's fullest frame; mask i aims into the i-th of S equal strata.
        erosion_px: (least, most) side of the square that the kept region is eroded by, px at 512; one for each mask.
        grid: (least, most) tracked points along each side.
        depth_tolerance: how far behind the drawn surface a pixel may lie and still be seen, as a share of its depth.
    """

    num_masks: int = 4
    visibility: float = 0.5
    tracking: float = 0.3
    novel_view: float = 0.2
    trajectories: tuple[str, ...] = ("orbit", "arc", "crane", "spiral", "lateral", "full", "dolly")
    max_angle_deg: float = 90.0
    hole_share: tuple[float, float] = (0.1, 0.9)
    erosion_px: tuple[int, int] = (2, 8)
    grid: tuple[int, int] = (10, 50)
    depth_tolerance: float = 0.02

    def __post_init__(self) -> None:
        def need(holds: bool, key: str, allowed: str) -> None:
            if not holds:
                raise ConfigError(f"masks.{key}", getattr(self, key), allowed)

        need(self.num_masks >= 1, "num_masks", "at least 1")
        for key in KINDS:
            need(getattr(self, key) >= 0, key, "a share, at least 0")
        need(self.visibility + self.tracking + self.novel_view > 0, "visibility", "the shares of the kinds are all 0")
        known = bool(self.trajectories) and set(self.trajectories) <= set(PATHS)
        need(known, "trajectories", f"one or more of {', '.join(PATHS)}")
        need(0 < self.max_angle_deg <= 90, "max_angle_deg", "above 0 and up to 90")
        need(0 <= self.hole_share[0] <= self.hole_share[1] < 1, "hole_share", "0 <= least <= most < 1")
        need(1 <= self.erosion_px[0] <= self.erosion_px[1], "erosion_px", "1 <= least <= most")
        need(2 <= self.grid[0] <= self.grid[1], "grid", "2 <= least <= most")
        need(self.depth_tolerance > 0, "depth_tolerance", "above 0")


@dataclass(frozen=True)
class MaskSet:
    """The masks of one clip.

    visible: bool [S, T, H, W], True = kept. kind: uint8 [S], index into KINDS. w2c: for each mask float64 [T, 4, 4]
    relative to each frame's own camera, None for tracking. hole_share: float32 [S, T]. target: float32 [S], the
    share of holes that was aimed at in the fullest frame.
    """

    visible: np.ndarray
    kind: np.ndarray
    w2c: list[np.ndarray | None]
    hole_share: np.ndarray
    target: np.ndarray


def draw(frames: np.ndarray, z_depth: np.ndarray, K: np.ndarray, config: MaskConfig, seed: int) -> MaskSet:
    """Return S masks of a clip; equal arguments give equal bits.

    Args:
        frames: uint8 [T, H, W, 3].
        z_depth: float32 [T, H, W], finite and positive (`geometry.depth.to_z_depth`).
        K: float64 [3, 3] px.

    Raises:
        BadSample: depth_shape, depth_nan, depth_nonpositive, flow_size.
    """
    if frames.shape[:3] != z_depth.shape:
        raise BadSample("depth_shape", f"frames {list(frames.shape)}, depth {list(z_depth.shape)}")
    count = config.num_masks
    rng = np.random.default_rng([seed, count])
    low, high = config.hole_share
    strata = (rng.permutation(count) + rng.uniform(0, 1, count)) / count
    targets = low + (high - low) * strata
    scene = _Scene(frames, z_depth, K)
    shares = np.array([getattr(config, kind) for kind in KINDS])
    kinds = rng.choice(len(KINDS), size=count, p=shares / shares.sum()).astype(np.uint8)
    if (kinds == TRACKING).any():
        _give_tracking_what_it_can_reach(kinds, targets, 1 - float(scene.dense()[1].mean(axis=(1, 2)).min()))
    visible, paths = np.empty((count, *z_depth.shape), bool), []
    for index, target in enumerate(targets):
        generator = np.random.default_rng([seed, count, index])
        if kinds[index] == TRACKING:
            visible[index], path = _draw_tracking(scene, config, target, generator), None
        else:
            visible[index], path = _draw_rendered(scene, KINDS[kinds[index]], config, target, generator)
        paths.append(path)
    share = 1 - visible.mean(axis=(2, 3), dtype=np.float64)
    return MaskSet(visible, kinds, paths, share.astype(np.float32), targets.astype(np.float32))


def _give_tracking_what_it_can_reach(kinds: np.ndarray, targets: np.ndarray, floor: float) -> None:
    """Exchange targets, in place, where tracks lose more of the picture (`floor`) than a tracking mask's target.

    With fast motion few points survive. A tracking mask then takes the smallest target above the floor from a rendered
    mask; where none has one, it becomes a visibility mask.
    """
    for index in np.flatnonzero(kinds == TRACKING):
        if targets[index] >= floor:
            continue
        others = [other for other in np.flatnonzero(kinds != TRACKING) if targets[other] >= floor]
        if others:
            other = min(others, key=lambda other: targets[other])
            targets[index], targets[other] = targets[other], targets[index]
        else:
            kinds[index] = KINDS.index("visibility")


class _Scene:
    """A clip with what several masks share: its meshes, also small ones for the search, and its tracks."""

    def __init__(self, frames: np.ndarray, z_depth: np.ndarray, K: np.ndarray):
        self.frames, self.z_depth, self.K = frames, np.ascontiguousarray(z_depth, np.float32), np.asarray(K, np.float64)
        self.radius = trajectory.radius_of(self.z_depth[0])
        self._meshes: dict[int, DWMesh] = {}
        self._small: _Scene | None = None
        self._dense: tuple[np.ndarray, np.ndarray] | None = None

    def mesh(self, t: int) -> DWMesh:
        if t not in self._meshes:
            self._meshes[t] = build(self.frames[t], self.z_depth[t], self.K)
        return self._meshes[t]

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        if self._dense is None:
            self._dense = tracks.follow(self.frames)
        return self._dense

    def small(self) -> _Scene:
        """The clip with every n-th pixel, which the search for an extent looks at."""
        step = max(1, min(self.z_depth.shape[1:]) // SEARCH_PX)
        if self._small is None and step > 1:
            cut = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
            K = self.K.copy()
            K[:2, 2] = (K[:2, 2] - step // 2 - 0.5) / step + 0.5
            K[[0, 1], [0, 1]] /= step
            self._small = _Scene(np.ascontiguousarray(self.frames[cut]), self.z_depth[cut], K)
            self._small.radius = self.radius
        return self._small or self


def _draw_rendered(
    scene: _Scene, kind: str, config: MaskConfig, target: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return (visible [T, H, W], w2c [T, 4, 4]) of the random path whose share of holes comes closest to the target."""
    num_frames = len(scene.frames)
    erosion_px = int(rng.integers(config.erosion_px[0], config.erosion_px[1] + 1))
    sign = rng.choice([-1.0, 1.0])
    names = [config.trajectories[index] for index in rng.permutation(len(config.trajectories))]
    moments = sorted({num_frames // 4, num_frames // 2, 3 * num_frames // 4, num_frames - 1})

    def path(name: str, extent: float) -> np.ndarray:
        keywords = PATHS[name](extent, sign, config.max_angle_deg)
        return trajectory.build(name, num_frames, radius=scene.radius, **keywords)

    def peak(w2c: np.ndarray) -> float:
        kept = np.stack([_view(scene.small(), t, w2c[t], kind, config.depth_tolerance) for t in moments])
        return float(1 - erode_all(kept, erosion_px).mean(axis=(1, 2)).min())

    best, best_error = path(names[0], 1.0), np.inf
    for name in names:
        low, high, extent = 0.0, 1.0, 1.0
        for _ in range(SEARCH_STEPS):
            w2c = path(name, extent)
            share = peak(w2c)
            if abs(share - target) < best_error:
                best, best_error = w2c, abs(share - target)
            if best_error < CLOSE_ENOUGH / 3 or (extent == 1.0 and share < target):
                break
            low, high = (extent, high) if share < target else (low, extent)
            extent = (low + high) / 2
        if best_error < CLOSE_ENOUGH:
            break
    visible = np.stack([_view(scene, t, best[t], kind, config.depth_tolerance) for t in range(num_frames)])
    visible[0] = True
    return erode(visible, erosion_px), best


def _view(scene: _Scene, t: int, w2c: np.ndarray, kind: str, tolerance: float) -> np.ndarray:
    if kind == "novel_view":
        return novel_view(scene.mesh(t), w2c)
    return visibility(scene.z_depth[t], scene.mesh(t), w2c, tolerance)


def _draw_tracking(scene: _Scene, config: MaskConfig, target: float, rng: np.random.Generator) -> np.ndarray:
    """Return visible [T, H, W] of tracked points; so many are dropped over time that the target share is met."""
    import cv2

    num_frames, height, width = scene.z_depth.shape
    count = int(rng.integers(config.grid[0], config.grid[1] + 1))
    erosion_px = int(rng.integers(config.erosion_px[0], config.erosion_px[1] + 1))
    field = rng.uniform(0, 1, (DRIFT_CELLS, DRIFT_CELLS)).astype(np.float32)
    noise = cv2.resize(field, (count, count), interpolation=cv2.INTER_CUBIC).ravel()
    priority = np.argsort(np.argsort(noise, kind="stable"), kind="stable") / noise.size  # uniform in [0, 1)
    spacing = np.array([width, height]) / count
    points = np.stack(np.meshgrid(*(np.arange(count) + 0.5,) * 2), axis=-1).reshape(-1, 2) * spacing
    xy, seen = tracks.track(scene.frames, points, scene.dense())

    def made(dropped: float, moments: np.ndarray) -> np.ndarray:
        late = moments / max(1, num_frames - 1) * dropped
        kept = tracking(xy[moments], seen[moments] & (priority >= late[:, None]), spacing, (height, width))
        return erode_all(kept, erosion_px)

    low, high, best, best_error = 0.0, 1.0, 0.0, np.inf
    moments = np.array(sorted({num_frames // 2, num_frames - 1}))
    for _ in range(SEARCH_STEPS):
        share = float(1 - made((low + high) / 2, moments).mean(axis=(1, 2)).min())
        if abs(share - target) < best_error:
            best, best_error = (low + high) / 2, abs(share - target)
        low, high = ((low + high) / 2, high) if share < target else (low, (low + high) / 2)
    visible = made(best, np.arange(num_frames))
    visible[0] = True
    return visible
