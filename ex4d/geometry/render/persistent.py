"""Fill the holes that the current frame's mesh leaves with static surfaces that other frames saw.

Each of those frames keeps its own depth watertight mesh with its curtains. Moving surfaces in it are drawn as occluded:
they cover what lies behind and show nothing. The current frame overrides all others. Among the others, the nearest in
time wins unless another surface lies clearly in front of it. Nothing is averaged.

A mesh loses the outer pixels of its frame, whose ring of vertices is pushed back, and surfaces at a grazing angle,
whose depth jumps from pixel to pixel as at an edge. Seen from the side, these are much of what another frame can
contribute. So the meshes here are padded by a ring of pixels, and a face that continues the plane of its surroundings
is not taken for an edge: over a plane, 1/z is linear in image space.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ex4d.errors import ConfigError
from ex4d.geometry.camera import Camera, relative_to
from ex4d.geometry.mesh import DWMesh, build, faces_with
from ex4d.geometry.profiles import PROFILES, Profile, profile_of
from ex4d.geometry.render import choose_backend, render

IN_FRONT = 0.95  # a surface replaces the one shown if it is nearer than this × its depth
# Assumed extent of a moving body behind its front, as a multiple of its depth (docs/decisions/source_cameras.md).
MOVING_REACH = 1.0
BEND = 0.2  # largest second difference of 1/z on a plane, as a fraction of its slope


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
    """Fill holes from other frames; return (cond_video uint8 [T, H, W, 3], visible bool [T, H, W]).

    Args:
        cond_video, visible: result of `warp_video` for the same clip and path.
        frames: uint8 [T, H, W, 3]. z_depth: [T, H, W]. K: [3, 3] of the source.
        w2c, source_w2c: [T, 4, 4] of the new cameras and of the source, in one world and unit.
        num_others: number of other frames that each frame may use, spread evenly over the clip.
        dynamic_mask: bool [T, H, W], True where the surface moves in the world; None: nothing moves.
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
    """A clip whose static surfaces persist; the mesh of each frame is built once. Fields as in `fill`."""

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
            holes: bool [H, W]. w2c: [4, 4] of the new camera, in the world of `source_w2c`. view_K: its [3, 3].
        """
        # Unknown depth says nothing about what lies behind it.
        known = self.z_depth[t] if self.valid is None else np.where(self.valid[t], self.z_depth[t], 0)
        holes = holes & ~self.behind_bodies(t, w2c, view_K)
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

    def behind_bodies(self, t: int, w2c: np.ndarray, view_K: np.ndarray) -> np.ndarray:
        """Return bool [H, W]: where frame t's view may show the side of a moving body that frame t does not see.

        No other frame shows where that side is at t. A body is assumed to extend MOVING_REACH × its depth backwards.
        """
        size = (self.z_depth.shape[1], self.z_depth.shape[2])
        if self.dynamic_mask is None or not self.dynamic_mask[t].any():
            return np.zeros(size, bool)
        profile = replace(PROFILES["default"], pixel_offset=self.profile.pixel_offset, curtain_reach=MOVING_REACH)
        mesh = build(self.frames[t], self.z_depth[t], self.K, profile)
        seen = render(mesh, Camera(view_K, relative_to(w2c, self.source_w2c[t]), size), self.backend)
        bodies = (mesh.face_occluded & faces_with(self.dynamic_mask[t])).ravel()
        return np.append(bodies, False)[np.where((seen.face_id >= 0) & (seen.face_id < len(bodies)), seen.face_id, -1)]

    def mesh(self, s: int) -> DWMesh:
        """Return the mesh of frame s, one pixel larger on every side; its moving surfaces show nothing."""
        if s not in self.meshes:
            moves = np.zeros(self.z_depth[s].shape, bool) if self.dynamic_mask is None else self.dynamic_mask[s]
            shows = ~moves if self.valid is None else self.valid[s] & ~moves
            frame, shows = (np.pad(x, ((1, 1), (1, 1), (0, 0))[: x.ndim], "edge") for x in (self.frames[s], shows))
            inverse = extended(1 / self.z_depth[s].astype(np.float64))
            K = self.K + np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]])
            mesh = build(frame, (1 / inverse).astype(np.float32), K, self.profile)
            hidden = mesh.face_occluded & ~on_planes(inverse) | faces_with(~shows)
            hidden[:, [0, -1]] = hidden[:, :, [0, -1]] = True  # the ring of vertices along the border is pushed back
            self.meshes[s] = replace(mesh, face_occluded=hidden)
        return self.meshes[s]


def extended(inverse: np.ndarray) -> np.ndarray:
    """Pad 1/z to [H + 2, W + 2] by linear extrapolation, limited to between half and twice the border's value."""
    for _ in range(2):  # rows, then columns
        first, last = 2 * inverse[:1] - inverse[1:2], 2 * inverse[-1:] - inverse[-2:-1]
        first, last = (np.clip(new, old / 2, old * 2) for new, old in ((first, inverse[:1]), (last, inverse[-1:])))
        inverse = np.concatenate([first, inverse, last]).T
    return inverse


def on_planes(inverse: np.ndarray) -> np.ndarray:
    """Return bool [2, H−1, W−1]: faces of the grid around which 1/z [H, W] is linear in image space.

    Two pixels on every side are checked, so that the slope of an edge blurred over up to four pixels is not a plane.
    """
    import cv2

    steps = [np.diff(inverse, axis=axis) for axis in (0, 1)]
    slope, bend = np.zeros_like(inverse), np.zeros_like(inverse)
    slope[1:-1] = np.abs(steps[0][1:] + steps[0][:-1]) / 2
    slope[:, 1:-1] = np.maximum(slope[:, 1:-1], np.abs(steps[1][:, 1:] + steps[1][:, :-1]) / 2)
    bend[1:-1] = np.abs(np.diff(steps[0], axis=0))
    bend[:, 1:-1] = np.maximum(bend[:, 1:-1], np.abs(np.diff(steps[1], axis=1)))
    linear = cv2.erode((bend <= BEND * slope).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return ~faces_with(~linear)


def _seen_through(
    depth: np.ndarray, chosen: np.ndarray, camera: Camera, present: np.ndarray, K: np.ndarray, z_depth: np.ndarray
) -> np.ndarray:
    """Return bool [N]: which points of the chosen pixels the current frame sees through, so that they are gone.

    Args:
        depth: [H, W] in the new camera. chosen: bool [H, W]. camera: the new one, world = the other frame's source.
        present: w2c [4, 4] of the current frame's source camera in that world. z_depth: [H, W], what it sees.
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
    """Return the frames that frame t may use: spread evenly over the clip, nearest in time first."""
    spread = np.unique(np.linspace(0, count - 1, min(num_others + 1, count)).round().astype(int))
    rest = sorted((int(s) for s in spread if s != t), key=lambda s: (abs(s - t), s))
    return rest[:num_others]
