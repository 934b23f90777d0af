"""A clip as its masks see it: meshes, tracks and a small twin of it, each made once and shared by several masks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ex4d.geometry import tracks, trajectory
from ex4d.geometry.mesh import DWMesh, build
from ex4d.geometry.visibility import novel_view, visibility

SMALL_PX = 64  # what a path leaves open is searched on pictures of about this size


class Scene:
    """A clip: frames uint8 [T, H, W, 3], z_depth float32 [T, H, W], K float64 [3, 3], and the radius of its orbits.

    valid: bool [T, H, W], True where depth is known; None: everywhere.
    """

    def __init__(self, frames: np.ndarray, z_depth: np.ndarray, K: np.ndarray, valid: np.ndarray | None = None):
        self.valid = valid
        self.frames, self.z_depth, self.K = frames, np.ascontiguousarray(z_depth, np.float32), np.asarray(K, np.float64)
        self.radius = trajectory.radius_of(self.z_depth[0])
        self._meshes: dict[int, DWMesh] = {}
        self._small: Scene | None = None
        self._dense: tuple[np.ndarray, np.ndarray] | None = None

    def mesh(self, t: int) -> DWMesh:
        """The mesh of frame t."""
        if t not in self._meshes:
            self._meshes[t] = build(
                self.frames[t], self.z_depth[t], self.K, valid=None if self.valid is None else self.valid[t]
            )
        return self._meshes[t]

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """What `tracks.follow` gives."""
        if self._dense is None:
            self._dense = tracks.follow(self.frames)
        return self._dense

    def small(self) -> Scene:
        """The clip with every n-th pixel, or itself where it is small."""
        step = max(1, min(self.z_depth.shape[1:]) // SMALL_PX)
        if self._small is None and step > 1:
            cut = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
            K = self.K.copy()
            K[:2, 2] = (K[:2, 2] - step // 2 - 0.5) / step + 0.5
            K[[0, 1], [0, 1]] /= step
            valid = None if self.valid is None else self.valid[cut]
            self._small = Scene(np.ascontiguousarray(self.frames[cut]), self.z_depth[cut], K, valid)
            self._small.radius = self.radius
        return self._small or self

    def views(self, moments: Iterable[int], w2c: np.ndarray, kind: str, tolerance: float) -> np.ndarray:
        """Return `view` of each of these frames, bool [len(moments), H, W]; w2c [T, 4, 4] is of all frames."""
        return np.stack([self.view(t, w2c[t], kind, tolerance) for t in moments])

    def view(self, t: int, w2c: np.ndarray, kind: str, tolerance: float) -> np.ndarray:
        """Return bool [H, W]: what a mask of a kind keeps of frame t for a novel camera [4, 4]."""
        if kind == "novel_view":
            return novel_view(self.mesh(t), w2c)
        kept = visibility(self.z_depth[t], self.mesh(t), w2c, tolerance)
        return kept if self.valid is None else kept & self.valid[t]
