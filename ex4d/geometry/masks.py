"""Simulated masks: what a training sample hides of its own video, so that no second view is needed (docs/method.md, 4).

| kind | keeps | pixels |
|---|---|---|
| `visibility` | what a novel camera would see of the source frame: a shadow-map test | the source's, exactly |
| `novel_view` | what the warp to the novel camera fills: the holes of generation | the novel view's |
| `tracking` | what tracked, visible points of frame 0 cover | the source's |

Each mask has its own target share of holes; targets are distributed like generation's shares on the same clip. The
extent of the camera path, or the number of dropped points, is searched to reach the target. A mask's share is that of
its frame with the most holes. Frame 0 has none. A mask depends on (seed, number of masks, its index).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ex4d.errors import BadSample
from ex4d.geometry import mask_targets, tracks, trajectory
from ex4d.geometry.mask_config import PATHS, MaskConfig
from ex4d.geometry.mask_scene import STANDS, Scene, SourceMotion
from ex4d.geometry.mask_search import CLOSE_ENOUGH, STEPS, Aimed, aim, missed
from ex4d.geometry.visibility import erode, erode_all, kept_share, novel_view, tracking, visibility

__all__ = ["KINDS", "MaskConfig", "MaskSet", "draw", "erode", "novel_view", "tracking", "visibility"]

KINDS = ("visibility", "novel_view", "tracking")
TRACKING = KINDS.index("tracking")
# If a kind cannot reach its share of holes on a clip, the next kind of its row is tried; the kind used is recorded.
INSTEAD = {"visibility": ("novel_view",), "novel_view": ("visibility",), "tracking": ("visibility", "novel_view")}
MET = 0.045  # largest accepted error of the share of holes; the tests allow 0.05
REDRAWS = 3  # how often a tracking mask's grid and erosion are redrawn
DRIFT_CELLS = 4  # cells per side of the noise that decides which points are dropped, so that holes are blobs


@dataclass(frozen=True)
class MaskSet:
    """The masks of one clip.

    visible: bool [S, T, H, W]. kind: uint8 [S], index into KINDS. w2c: for each mask float64 [T, 4, 4]
    relative to each frame's own camera, None for tracking. hole_share: float32 [S, T]. target: float32 [S], the
    target share of holes in the frame with the most. generation: float32 [G, T], the share of holes of the
    clip's warp along each path of `MaskConfig.generation`, measured on small pictures.
    """

    visible: np.ndarray
    kind: np.ndarray
    w2c: list[np.ndarray | None]
    hole_share: np.ndarray
    target: np.ndarray
    generation: np.ndarray


def draw(
    frames: np.ndarray,
    z_depth: np.ndarray,
    K: np.ndarray,
    config: MaskConfig,
    seed: int,
    valid: np.ndarray | None = None,
    source: SourceMotion = STANDS,
    device: str | None = None,
) -> MaskSet:
    """Draw S masks of a clip; equal arguments give bit-identical masks.

    Args:
        frames: uint8 [T, H, W, 3].
        z_depth: float32 [T, H, W], finite and positive (`geometry.depth.to_z_depth`).
        K: float64 [3, 3] px.
        valid: bool [T, H, W], True where depth is known; None: everywhere. Unknown depth is a hole in every mask.
        source: how the source camera moves, and whether static surfaces persist.
        device: device of a tracker that is a network: cpu, cuda or cuda:N; None: a GPU if there is one.

    Raises:
        BadSample: depth_shape, depth_nan, depth_nonpositive, flow_size.
    """
    if frames.shape[:3] != z_depth.shape:
        raise BadSample("depth_shape", f"frames {list(frames.shape)}, depth {list(z_depth.shape)}")
    count = config.num_masks
    rng = np.random.default_rng([seed, count])
    scene = Scene(frames, z_depth, K, valid, source, device=device)
    generated = mask_targets.generation_holes(scene.small(), config.generation)
    places = (rng.permutation(count) + rng.uniform(0, 1, count)) / count
    targets = mask_targets.spread_targets(places, *config.hole_share, generated.max(axis=1, initial=0.0))
    shares = np.array([getattr(config, kind) for kind in KINDS])
    kinds = rng.choice(len(KINDS), size=count, p=shares / shares.sum()).astype(np.uint8)
    if (kinds == TRACKING).any() and config.tracker == "flow":
        _give_tracking_what_it_can_reach(kinds, targets, 1 - float(scene.dense[1].mean(axis=(1, 2)).min()))
    drawn = [_draw_one(scene, KINDS[kinds[i]], config, targets[i], [seed, count, i]) for i in range(count)]
    visible = np.stack([mask.visible for mask in drawn])
    share = 1 - np.stack([kept_share(mask) for mask in visible])
    return MaskSet(
        visible,
        np.array([KINDS.index(mask.kind) for mask in drawn], np.uint8),
        [mask.w2c for mask in drawn],
        share.astype(np.float32),
        targets.astype(np.float32),
        generated,
    )


def _give_tracking_what_it_can_reach(kinds: np.ndarray, targets: np.ndarray, floor: float) -> None:
    """Reassign, in place, tracking masks whose target is below `floor`, the share of holes that lost tracks leave.

    With fast motion few points survive. A tracking mask then swaps targets with the rendered mask that has the smallest
    target above the floor; if there is none, it becomes a visibility mask.
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


@dataclass(frozen=True)
class _Drawn:
    """One mask: its kind, visible [T, H, W], w2c [T, 4, 4] or None, and the absolute error of its share of holes."""

    kind: str
    visible: np.ndarray
    w2c: np.ndarray | None
    error: float


NOTHING = _Drawn("", np.zeros((0, 0, 0), bool), None, np.inf)


def _draw_one(scene: Scene, kind: str, config: MaskConfig, target: float, seed: list[int]) -> _Drawn:
    """Draw the mask of a kind, or of a kind that stands in for it, that comes closest to the target."""
    rng = np.random.default_rng(seed)
    best = NOTHING
    for name in (kind, *INSTEAD[kind]):
        candidate = (_draw_tracking if name == "tracking" else _draw_rendered)(scene, name, config, target, rng)
        best = min(best, candidate, key=lambda mask: mask.error)
        if best.error <= MET:
            break
    return best


def _draw_rendered(scene: Scene, kind: str, config: MaskConfig, target: float, rng: np.random.Generator) -> _Drawn:
    """Draw the mask of a random path, with the extent at which its share of holes is the target.

    Paths are tried in random order until one reaches the target, then all again with the least erosion. All frames are
    rendered only for a path whose fullest frames come close, or, if there is none, for the closest.
    """
    erosion = int(rng.integers(config.erosion_px[0], config.erosion_px[1] + 1))
    sign = rng.choice([-1.0, 1.0])
    names = [config.trajectories[index] for index in rng.permutation(len(config.trajectories))]
    tries = [(name, erosion_px) for erosion_px in dict.fromkeys((erosion, config.erosion_px[0])) for name in names]
    num_frames = len(scene.frames)

    def drawn(aimed: Aimed) -> _Drawn:
        visible = scene.views(range(num_frames), aimed.w2c, kind, config.depth_tolerance)
        visible[0] = True
        visible = erode(visible, aimed.erosion_px)
        return _Drawn(kind, visible, aimed.w2c, abs(missed(visible, target)))

    best, closest = NOTHING, None
    for name, erosion_px in tries:

        def path(extent: float, name: str = name) -> np.ndarray:
            keywords = PATHS[name](extent, sign, config.max_angle_deg)
            return scene.path(trajectory.build(name, num_frames, radius=scene.radius, **keywords))

        aimed = aim(scene, path, kind, target, erosion_px, config.depth_tolerance)
        if aimed.error <= CLOSE_ENOUGH:
            best = min(best, drawn(aimed), key=lambda mask: mask.error)
            if best.error <= CLOSE_ENOUGH:
                return best
        elif closest is None or aimed.error < closest.error:
            closest = aimed
    if closest is not None and closest.error < best.error:
        best = min(best, drawn(closest), key=lambda mask: mask.error)
    return best


def _draw_tracking(scene: Scene, kind: str, config: MaskConfig, target: float, rng: np.random.Generator) -> _Drawn:
    """Draw the mask of tracked points, dropping points over time so that its share of holes is the target."""
    best = NOTHING
    for attempt in range(REDRAWS + 1):
        count = int(rng.integers(config.grid[0], config.grid[1] + 1))
        erosion_px = int(rng.integers(config.erosion_px[0], config.erosion_px[1] + 1))
        if attempt == REDRAWS:
            count, erosion_px = config.grid[1], config.erosion_px[0]
        visible = _tracked(scene, config, count, erosion_px, target, rng)
        candidate = _Drawn(kind, visible, None, abs(missed(visible, target)))
        best = min(best, candidate, key=lambda mask: mask.error)
        if best.error <= MET:
            break
    return best


def _tracked(
    scene: Scene, config: MaskConfig, count: int, erosion_px: int, target: float, rng: np.random.Generator
) -> np.ndarray:
    """Return visible [T, H, W] of a grid of count × count points; blobs of them are dropped over time."""
    import cv2

    num_frames, height, width = scene.z_depth.shape
    field = rng.uniform(0, 1, (DRIFT_CELLS, DRIFT_CELLS)).astype(np.float32)
    noise = cv2.resize(field, (count, count), interpolation=cv2.INTER_CUBIC).ravel()
    priority = np.argsort(np.argsort(noise, kind="stable"), kind="stable") / noise.size  # uniform in [0, 1)
    spacing = np.array([width, height]) / count
    points = np.stack(np.meshgrid(*(np.arange(count) + 0.5,) * 2), axis=-1).reshape(-1, 2) * spacing
    dense = scene.dense if config.tracker == "flow" else None
    xy, seen = tracks.track(scene.frames, points, dense, config.tracker, config.tracker_path, scene.device)

    def mask_at(dropped: float, moments: np.ndarray) -> np.ndarray:
        late = moments / max(1, num_frames - 1) * dropped
        cover = tracking(xy[moments], seen[moments] & (priority >= late[:, None]), spacing, (height, width))
        if scene.valid is not None:
            cover &= scene.valid[moments]
        return erode_all(cover, erosion_px)

    low, high, best, least = 0.0, 1.0, 0.0, np.inf
    moments = np.array(sorted({num_frames // 2, num_frames - 1}))
    for _ in range(STEPS):
        error = missed(mask_at((low + high) / 2, moments), target)
        if abs(error) < least:
            best, least = (low + high) / 2, abs(error)
        low, high = ((low + high) / 2, high) if error < 0 else (low, (low + high) / 2)
    visible = mask_at(best, np.arange(num_frames))
    visible[0] = True
    return visible
