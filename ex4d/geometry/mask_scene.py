"""The data of a clip that its masks share: meshes, tracks and a downscaled copy, each computed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ex4d.geometry import camera_path, tracks, trajectory, visibility
from ex4d.geometry.camera import Camera, relative_to
from ex4d.geometry.mesh import DWMesh, build
from ex4d.geometry.profiles import profile_of
from ex4d.geometry.render import cpu, persistent


@dataclass(frozen=True)
class SourceMotion:
    """How the source camera of a clip moves, and how the masks treat that motion, as in generation.

    Attributes:
        w2c: float64 [T, 4, 4] in the unit of the depth; None: unknown, assumed not to move.
        motion: how that motion is treated, one of camera_path.SOURCE_MOTIONS. fps: of the clip, for "smooth".
        persistent_frames: number of other frames; static surfaces that the novel path sees in them are kept, too.
        dynamic_mask: bool [T, H, W], True where the surface moves in the world; None: nothing moves.
    """

    w2c: np.ndarray | None = None
    motion: str = "keep"
    fps: float = 24.0
    persistent_frames: int = 0
    dynamic_mask: np.ndarray | None = None


STANDS = SourceMotion()
SMALL_PX = 64  # the extent of a path is searched on pictures of about this size
# Shadow maps are rendered at about this size. IoU with ray casting, on twelve views of three 512² clips: 0.972 at half
# size, 0.971 at full size, which takes four times as long.
SHADOW_PX = 256


class Scene:
    """A clip: frames uint8 [T, H, W, 3], z_depth float32 [T, H, W], K float64 [3, 3], and the radius of its orbits.

    valid: bool [T, H, W], True where depth is known; None: everywhere. step: side of a pixel in full-size pixels.
    device: device of a tracker that is a network, as in `masks.draw`.
    """

    def __init__(
        self,
        frames: np.ndarray,
        z_depth: np.ndarray,
        K: np.ndarray,
        valid: np.ndarray | None = None,
        source: SourceMotion = STANDS,
        step: int = 1,
        device: str | None = None,
    ):
        self.valid, self.source, self.step, self.device = valid, source, step, device
        self.frames, self.z_depth, self.K = frames, np.ascontiguousarray(z_depth, np.float32), np.asarray(K, np.float64)
        self.radius = trajectory.radius_of(self.z_depth[0])
        self._meshes: dict[int, DWMesh] = {}
        self._torn: dict[int, np.ndarray] = {}
        self._reduced: dict[int, Scene] = {1: self}
        still = np.tile(np.eye(4), (len(frames), 1, 1)) if source.w2c is None else source.w2c
        others = (source.persistent_frames, source.dynamic_mask, valid, profile_of("default"), "cpu")
        self._world = persistent.World(frames, self.z_depth, self.K, still, *others)

    def mesh(self, t: int) -> DWMesh:
        """Return the mesh of frame t, built once."""
        if t not in self._meshes:
            self._meshes[t] = build(
                self.frames[t], self.z_depth[t], self.K, valid=None if self.valid is None else self.valid[t]
            )
        return self._meshes[t]

    @cached_property
    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """The result of `tracks.follow`."""
        return tracks.follow(self.frames)

    def small(self) -> Scene:
        """Return the clip subsampled to a shorter side of about SMALL_PX."""
        return self._with_every(min(self.z_depth.shape[1:]) // SMALL_PX)

    def _with_every(self, step: int) -> Scene:
        """Return the clip with every `step`-th pixel; the clip itself if `step` is 0 or 1."""
        step = max(1, step)
        if step not in self._reduced:
            cut = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
            K = self.K.copy()
            K[:2, 2] = (K[:2, 2] - step // 2 - 0.5) / step + 0.5
            K[[0, 1], [0, 1]] /= step
            valid = None if self.valid is None else self.valid[cut]
            moves = self.source.dynamic_mask
            source = replace(self.source, dynamic_mask=None if moves is None else moves[cut])
            reduced = Scene(np.ascontiguousarray(self.frames[cut]), self.z_depth[cut], K, valid, source, step)
            reduced.radius = self.radius
            self._reduced[step] = reduced
        return self._reduced[step]

    def path(self, w2c: np.ndarray) -> np.ndarray:
        """Convert a path w2c [T, 4, 4], made for a fixed source camera, to poses relative to each frame's camera."""
        return camera_path.beside_source(w2c, self.source.w2c, self.source.motion, self.source.fps)

    def views(self, moments: Iterable[int], w2c: np.ndarray, kind: str, tolerance: float) -> np.ndarray:
        """Return `view` of each frame in `moments`, bool [len(moments), H, W]; w2c [T, 4, 4] covers all frames."""
        moments = list(moments)
        visible = np.empty((len(moments), *self.z_depth.shape[1:]), bool)
        for t, view in zip(moments, visible, strict=True):
            view[:] = self.view(t, w2c, kind, tolerance)
        return visible

    def view(self, t: int, w2c: np.ndarray, kind: str, tolerance: float) -> np.ndarray:
        """Return frame t's mask, bool [H, W], True = kept, for a novel path w2c [T, 4, 4] as `path` returns it."""
        if kind == "novel_view":
            visible = visibility.novel_view(self.mesh(t), w2c[t])
            return visible | self._world.fill(t, ~visible, w2c[t] @ self._world.source_w2c[t], self.K)[1]
        visible = self._seen(t, w2c[t], self._shadow_map(t, w2c[t]), tolerance)
        visible |= self._seen_later(t, ~visible, w2c, tolerance)
        return visible if self.valid is None else visible & self.valid[t]

    def _seen_later(self, t: int, hidden: np.ndarray, w2c: np.ndarray, tolerance: float) -> np.ndarray:
        """Return bool [H, W]: hidden static pixels of frame t that the novel path sees in another frame."""
        seen, moves, source = np.zeros_like(hidden), self.source.dynamic_mask, self._world.source_w2c
        static = hidden if moves is None else hidden & ~moves[t]
        for s in persistent.others(t, len(self.frames), self.source.persistent_frames):
            there = relative_to(w2c[s] @ source[s], source[t])
            seen |= static & self._seen(t, there, self._shadow_map(s, w2c[s]), tolerance)
        return seen

    def _seen(self, t: int, w2c: np.ndarray, shadow_map: np.ndarray, tolerance: float) -> np.ndarray:
        if t not in self._torn:
            self._torn[t] = visibility.tears(self.z_depth[t], self.K, profile_of("default"))
        return visibility.seen(self.z_depth[t], self.K, w2c, self._torn[t], shadow_map, tolerance)

    def _shadow_map(self, t: int, w2c: np.ndarray) -> np.ndarray:
        """Render frame t's z-depth, float32 [h, w] of about SHADOW_PX, from w2c [4, 4] relative to its own camera."""
        scene = self._with_every(round(min(self.z_depth.shape[1:]) / SHADOW_PX))
        mesh, K = scene.mesh(t), self.K.copy()
        K[0] *= mesh.size[1] / self.z_depth.shape[2]
        K[1] *= mesh.size[0] / self.z_depth.shape[1]
        return cpu.render_depth(mesh, Camera(K, w2c, mesh.size))
