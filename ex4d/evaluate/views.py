"""Build views to evaluate: a clip and a new camera path, with the true video from that path where it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ex4d import synthetic
from ex4d.geometry import camera_path
from ex4d.geometry.camera import Camera, relative_to
from ex4d.geometry.render import persistent, warp_video
from ex4d.reconstruct import Clip


@dataclass(frozen=True)
class Path:
    """The path of a new camera, as `camera_path.build` takes it.

    Attributes:
        name: of a trajectory, or a pose file. angle_deg: extent of a rotating path.
        options: further arguments: `zoom` of a zoom, `scale` of a file, …
    """

    name: str
    angle_deg: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class View:
    """A clip, a camera path, and the clip's mesh rendered along it.

    Attributes:
        clip: the source.
        w2c: float64 [T, 4, 4] of the new cameras, world = the source camera of the same frame; view_K: [T, 3, 3].
        cond_video: uint8 [T, H, W, 3], zero where not visible; visible: bool [T, H, W].
        truth: uint8 [T, H, W, 3], what the new camera sees; None if it is unknown.
        backend: the renderer, as in `render.choose_backend`.
    """

    clip: Clip
    w2c: np.ndarray
    view_K: np.ndarray
    cond_video: np.ndarray
    visible: np.ndarray
    truth: np.ndarray | None = None
    backend: str = "auto"


def scene_clip(index: int, world: synthetic.SyntheticConfig, profile: str = "default") -> Clip:
    """Return scene `index` of a procedural corpus from its source camera, with exact depth."""
    scene, cameras = synthetic.clip_scene(world, index)
    frames, z_depth = synthetic.render_clip(scene, cameras, world.fps, world.supersample)
    source_w2c = np.stack([relative_to(camera.w2c, cameras[0].w2c) for camera in cameras])
    moves = np.stack([scene.moving(camera, t / world.fps) for t, camera in enumerate(cameras)])
    facts = {"estimator": "exact"}
    return Clip(frames, world.fps, z_depth, cameras[0].K, profile, facts, source_w2c=source_w2c, dynamic_mask=moves)


def along(
    clip: Clip, path: Path, source_motion: str = "keep", persistent_frames: int = 0, backend: str = "auto"
) -> View:
    """Return the view of a clip along a path, without known truth.

    Args:
        source_motion: "keep": the new camera keeps its pose relative to the source camera of the same frame; for others
            see `camera_path.with_source`. A source with unknown cameras counts as static.
        persistent_frames: number of other frames that fill holes with the static surfaces that they saw.
        backend: the renderer, as in `render.choose_backend`.

    Raises:
        ConfigError, ContractError: as `camera_path.build`.
    """
    count = len(clip.frames)
    w2c, K = camera_path.build(path.name, count, path.angle_deg, clip.radius, clip.K, path.options)
    view_K, source = np.broadcast_to(K, (count, 3, 3)), clip.source_w2c
    w2c = camera_path.beside_source(w2c, source, source_motion, clip.fps)
    drawn = (clip.frames, clip.z_depth, clip.K, w2c, clip.profile, backend)
    warp = warp_video(*drawn, view_K=view_K, valid=clip.valid_mask)
    if persistent_frames:
        source = np.tile(np.eye(4), (count, 1, 1)) if source is None else source
        warp = persistent.fill(
            *warp,
            frames=clip.frames,
            z_depth=clip.z_depth,
            K=clip.K,
            w2c=w2c @ source,
            source_w2c=source,
            num_others=persistent_frames,
            dynamic_mask=clip.dynamic_mask,
            profile=clip.profile,
            backend=backend,
            view_K=view_K,
            valid=clip.valid_mask,
        )
    return View(clip, w2c, view_K, *warp, backend=backend)


def with_truth(view: View, index: int, world: synthetic.SyntheticConfig) -> View:
    """Return the view of scene `index` with its true novel view."""
    scene, cameras = synthetic.clip_scene(world, index)
    places = zip(view.view_K, view.w2c, cameras, strict=True)
    moved = [Camera(K, step @ source.w2c, world.size) for K, step, source in places]
    truth, _ = synthetic.render_clip(scene, moved, world.fps, world.supersample)
    return replace(view, truth=truth)
