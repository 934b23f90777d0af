"""A static world that persists: surfaces that other frames saw, drawn where the present frame's mesh leaves a hole.

Each of those frames keeps its own depth watertight mesh with its curtains. Moving surfaces in it are drawn as occluded:
they cover what lies behind and show nothing. The present frame overrides all others. Among the others, the nearest in
time wins unless another surface lies clearly in front of it. Nothing is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ex4d.errors import ConfigError
from ex4d.geometry.camera import Camera, relative_to
from ex4d.geometry.mesh import DWMesh, build
from ex4d.geometry.profiles import Profile, profile_of
from ex4d.geometry.render import choose_backend, render

IN_FRONT = 0.95  # a surface nearer than this × the depth shown covers it


def fill(
    cond_video: np.ndarray,
    visible: np.ndarray,
    frames: np.ndarray,
    z_depth: np.ndarray,
    K: np.ndarray,
    w2c: np.ndarray,
    source_w2c: np.ndarray,
    num_others: int,
    dynamic_mask: np.ndarray | None = None,
    profile: str | Profile = "default",
    backend: str = "auto",
    view_K: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (cond_video uint8 [T, H, W, 3], visible bool [T, H, W]) with holes filled by other frames.

    Args:
        cond_video, visible: result of `warp_video` for the same clip and path.
        frames: uint8 [T, H, W, 3]. z_depth: [T, H, W]. K: [3, 3] of the source.
        w2c, source_w2c: [T, 4, 4] of the new cameras and of the source, in one world and unit.
        num_others: number of other frames that each frame may use, spread evenly over the clip.
        dynamic_mask: bool [T, H, W], True where the surface moves in the world; None: everything stands still.
        view_K: [3, 3] or [T, 3, 3] of the new cameras. valid: bool [T, H, W], True where depth is known; None: all.

    Raises:
        ConfigError: `num_others` is negative.
    """
    if num_others < 0:
        raise ConfigError("persistent_frames", num_others, "must be at least 0")
    count = len(frames)
    profile = profile_of(profile) if isinstance(profile, str) else profile
    masks = (dynamic_mask, valid)
    world = World(frames, z_depth, K, source_w2c, num_others, *masks, profile, choose_backend(backend))
    views = np.broadcast_to(K if view_K is None else view_K, (count, 3, 3))
    shown, seen = cond_video.copy(), visible.copy()
    for t in range(count):
        colour, added = world.fill(t, ~visible[t], w2c[t], views[t])
        shown[t][added], seen[t][added] = colour[added], True
    return shown, seen


@dataclass(frozen=True)
class World:
    """A clip whose static surfaces persist; the meshes of its frames are made once. Fields as in `fill`."""

    frames: np.ndarray
    z_depth: np.ndarray
    K: np.ndarray
    source_w2c: np.ndarray
    num_others: int
    dynamic_mask: np.ndarray | None
    valid: np.ndarray | None
    profile: Profile
    backend: str
    meshes: dict[int, DWMesh] = field(default_factory=dict)

    def fill(self, t: int, holes: np.ndarray, w2c: np.ndarray, view_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (colour uint8 [H, W, 3], added bool [H, W]): what other frames show in the holes of frame t's view.

        Args:
            holes: bool [H, W]. w2c: [4, 4] of the new camera, in the world of `source_w2c`. view_K: [3, 3] of it.
        """
        # Unknown depth says nothing about what lies behind it.
        known = self.z_depth[t] if self.valid is None else np.where(self.valid[t], self.z_depth[t], 0)
        depth = np.full(holes.shape, np.inf, np.float32)
        colour, added = np.zeros((*holes.shape, 3), np.uint8), np.zeros_like(holes)
        for s in others(t, len(self.frames), self.num_others) if holes.any() else ():
            camera = Camera(view_K, relative_to(w2c, self.source_w2c[s]), (holes.shape[0], holes.shape[1]))
            view = render(self.mesh(s), camera, self.backend)
            better = holes & view.visible_mask & (view.z_depth < IN_FRONT * depth)
            present = relative_to(self.source_w2c[t], self.source_w2c[s])
            better[better] = ~_seen_through(view.z_depth, better, camera, present, self.K, known)
            colour[better], added[better], depth[better] = view.colour[better], True, view.z_depth[better]
        return colour, added

    def mesh(self, s: int) -> DWMesh:
        """Return the mesh of frame s, whose moving surfaces show nothing."""
        if s not in self.meshes:
            moves = np.zeros(self.z_depth[s].shape, bool) if self.dynamic_mask is None else self.dynamic_mask[s]
            shows = ~moves if self.valid is None else self.valid[s] & ~moves
            valid = None if shows.all() else shows
            self.meshes[s] = build(self.frames[s], self.z_depth[s], self.K, self.profile, valid=valid)
        return self.meshes[s]


def _seen_through(
    depth: np.ndarray, chosen: np.ndarray, camera: Camera, present: np.ndarray, K: np.ndarray, z_depth: np.ndarray
) -> np.ndarray:
    """Return bool [N]: of the chosen pixels' points, those that the present frame sees through: they are gone.

    Args:
        depth: [H, W] in the new camera. chosen: bool [H, W]. camera: the new one, world = the other frame's source.
        present: w2c [4, 4] of the present frame's source camera in that world. z_depth: [H, W], what it sees.
    """
    row, column = np.nonzero(chosen)
    pixels = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], axis=1)
    local = pixels @ np.linalg.inv(camera.K).T * depth[chosen][:, None]
    world = local @ camera.c2w[:3, :3].T + camera.eye
    there = world @ present[:3, :3].T + present[:3, 3]
    z = np.maximum(there[:, 2], 1e-9)
    x, y = np.floor(K[0, 0] * there[:, 0] / z + K[0, 2]), np.floor(K[1, 1] * there[:, 1] / z + K[1, 2])
    height, width = z_depth.shape
    inside = (there[:, 2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = (np.where(inside, value, 0).astype(int) for value in (x, y))
    return inside & (there[:, 2] < IN_FRONT * z_depth[y, x])


def others(t: int, count: int, num_others: int) -> list[int]:
    """Return the frames that frame t may use, nearest in time first: spread evenly over the clip."""
    spread = np.unique(np.linspace(0, count - 1, min(num_others + 1, count)).round().astype(int))
    rest = sorted((int(s) for s in spread if s != t), key=lambda s: (abs(s - t), s))
    return rest[:num_others]
