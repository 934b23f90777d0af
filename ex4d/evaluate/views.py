"""What is evaluated: a clip and a new camera, with the true picture of that camera where somebody knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import synthetic
from ex4d.geometry.camera import Camera, relative_to
from ex4d.geometry.render import warp_video
from ex4d.geometry.trajectory import build, radius_of
from ex4d.reconstruct import reconstruct


@dataclass(frozen=True)
class View:
    """A clip, a path, and what the mesh of the clip shows along it.

    Attributes:
        frames: uint8 [T, H, W, 3] of the source; z_depth: float32 [T, H, W]; K: float64 [3, 3].
        w2c: float64 [T, 4, 4] of the new cameras, world = the source camera of the same frame; view_K: [T, 3, 3].
        radius: of the path, in units of the depth.
        cond_video: uint8 [T, H, W, 3], zero where not visible; visible: bool [T, H, W].
        truth: uint8 [T, H, W, 3], what the new camera sees; None where nobody knows.
        fps: frames per second. profile: of the meshes.
    """

    frames: np.ndarray
    z_depth: np.ndarray
    K: np.ndarray
    w2c: np.ndarray
    view_K: np.ndarray
    radius: float
    cond_video: np.ndarray
    visible: np.ndarray
    truth: np.ndarray | None
    fps: float
    profile: str = "default"


def of_scene(
    index: int, world: synthetic.SyntheticConfig, trajectory: str, angle_deg: float, profile: str = "default"
) -> View:
    """Return scene `index` of a procedural corpus with its exact novel view.

    The new camera keeps its pose relative to the source camera of the same frame, as the mesh of each frame does.
    """
    scene, cameras = synthetic.clip_scene(world, index)
    frames, z_depth = synthetic.render_clip(scene, cameras, world.fps, world.supersample)
    K, radius = cameras[0].K, radius_of(z_depth[0])
    path = build(trajectory, len(frames), angle_deg, radius)
    moved = [Camera(K, step @ camera.w2c, world.size) for step, camera in zip(path, cameras, strict=True)]
    truth, _ = synthetic.render_clip(scene, moved, world.fps, world.supersample)
    cond_video, visible = warp_video(frames, z_depth, K, path, profile)
    view_K = np.broadcast_to(K, (len(frames), 3, 3))
    return View(frames, z_depth, K, path, view_K, radius, cond_video, visible, truth, world.fps, profile)


def of_video(path: str | Path, **choices: Any) -> View:
    """Return a video of one's own, whose true novel view nobody knows.

    Args:
        choices: as `reconstruct` takes them: trajectory_name, angle_deg, depth, num_frames, size, …

    Raises:
        ConfigError, BadSample, ContractError: as `reconstruct`.
    """
    made = reconstruct(path, **choices)
    w2c = made.w2c if made.source_w2c is None else relative_to(made.w2c, made.source_w2c)
    return View(
        frames=made.frames,
        z_depth=made.z_depth,
        K=made.K,
        w2c=w2c,
        view_K=np.broadcast_to(made.view_K, (len(made.frames), 3, 3)),
        radius=made.choices["radius"],
        cond_video=made.cond_video,
        visible=made.visible,
        truth=None,
        fps=made.fps,
        profile=made.profile,
    )
