"""Moving parts are found where the depth does not report them, and leave no ghosts in persistent surfaces."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.depth import dynamic
from ex4d.geometry import trajectory
from ex4d.geometry.render import persistent, warp_video
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip


def clip(motion: str, moving_bodies: bool = True, seed: int = 0):
    config = SyntheticConfig(
        num_frames=9, size=(96, 96), seed=seed, camera_motion=motion, moving_bodies=moving_bodies, supersample=1
    )
    scene, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(scene, cameras, config.fps)
    moves = np.stack([scene.moving(camera, t / config.fps) for t, camera in enumerate(cameras)])
    w2c = np.stack([camera.w2c for camera in cameras]) @ cameras[0].c2w
    return frames, z_depth, cameras[0].K, w2c, moves


@pytest.mark.parametrize(("motion", "least"), [("static", 0.97), ("gentle", 0.9), ("strong", 0.9)])
def test_moving_bodies_are_found(motion: str, least: float):
    frames, z_depth, K, w2c, moves = clip(motion)
    found = dynamic.of_flow(frames, z_depth, K, None if motion == "static" else w2c)
    assert (found & moves).sum() > least * moves.sum()
    assert (found & ~moves).sum() < 0.25 * (~moves).sum()


def test_in_a_scene_that_stands_nearly_nothing_moves():
    frames, z_depth, K, w2c, _ = clip("strong", moving_bodies=False)
    assert dynamic.of_flow(frames, z_depth, K, w2c).mean() < 0.08  # edges of the depth; 0.063 measured


def test_with_wrong_cameras_nothing_is_known_to_stand():
    frames, z_depth, K, _, _ = clip("strong", moving_bodies=False)
    assert dynamic.of_flow(frames, z_depth, K, None).mean() > 0.5


def test_one_frame_stands():
    frames, z_depth, K, w2c, _ = clip("gentle")
    assert not dynamic.of_flow(frames[:1], z_depth[:1], K, w2c[:1]).any()


def test_moving_bodies_leave_fewer_ghosts():
    frames, z_depth, K, _, moves = clip("static")
    path = trajectory.build("orbit", len(frames), 30.0, trajectory.radius_of(z_depth[0]))
    warped = warp_video(frames, z_depth, K, path)
    shown = {}
    for name, mask in (("true", moves), ("found", dynamic.of_flow(frames, z_depth, K, None)), ("none", None)):
        _, visible = persistent.fill(*warped, frames, z_depth, K, path, np.tile(np.eye(4), (9, 1, 1)), 4, mask)
        shown[name] = visible & ~warped[1]
    ghosts = {name: int((shown[name] & ~shown["true"]).sum()) for name in ("found", "none")}
    assert ghosts["found"] < 0.1 * ghosts["none"]
