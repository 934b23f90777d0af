"""Masks of a clip with a moving camera: paths fixed in the world, and persistent static surfaces, as in generation."""

from __future__ import annotations

import numpy as np
from sight import visible_from

from ex4d.geometry import trajectory
from ex4d.geometry.camera import relative_to
from ex4d.geometry.mask_scene import Scene, SourceMotion
from ex4d.geometry.masks import MaskConfig, draw
from ex4d.geometry.render import persistent, warp_video
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

FPS, SIZE, NUM_FRAMES = 4.0, (64, 64), 7


def clip(moving_bodies: bool = True):
    """Return (scene, cameras, frames, z_depth, source w2c, dynamic mask) of a camera that moves much."""
    config = SyntheticConfig(
        num_frames=NUM_FRAMES, size=SIZE, fps=FPS, seed=1, camera_motion="strong", moving_bodies=moving_bodies
    )
    scene, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(scene, cameras, FPS)
    moves = np.stack([scene.moving(camera, t / FPS) for t, camera in enumerate(cameras)])
    return scene, cameras, frames, z_depth, np.stack([camera.w2c for camera in cameras]), moves


def test_novel_view_masks_leave_the_holes_of_generation():
    _, cameras, frames, z_depth, source, moves = clip()
    K = cameras[0].K
    path = trajectory.build("orbit", NUM_FRAMES, 30.0, trajectory.radius_of(z_depth[0]))
    for num in (0, 3):
        world = Scene(frames, z_depth, K, None, SourceMotion(source, "remove", FPS, num, moves))
        masks = world.views(range(NUM_FRAMES), world.path(path), "novel_view", 0.0)
        drawn = warp_video(frames, z_depth, K, path, source_w2c=source)
        visible = drawn[1] if not num else persistent.fill(*drawn, frames, z_depth, K, path, source, num, moves)[1]
        assert np.array_equal(masks[1:], visible[1:])  # of frame 0 the warp shows the frame itself


def test_a_path_that_rides_on_the_source_is_the_path_itself():
    _, cameras, frames, z_depth, source, _ = clip()
    path = trajectory.build("orbit", NUM_FRAMES, 30.0, 2.0)
    kept = Scene(frames, z_depth, cameras[0].K, None, SourceMotion(source, "keep"))
    removed = Scene(frames, z_depth, cameras[0].K, None, SourceMotion(source, "remove"))
    assert np.array_equal(kept.path(path), path)
    np.testing.assert_allclose(removed.path(path), relative_to(path, source))


def test_visibility_keeps_static_pixels_that_the_path_sees_at_another_time():
    scene, cameras, frames, z_depth, source, moves = clip()
    path = trajectory.build("orbit", NUM_FRAMES, 60.0, trajectory.radius_of(z_depth[0]))
    kept = {}
    for num in (0, 3):
        world = Scene(frames, z_depth, cameras[0].K, None, SourceMotion(source, "remove", FPS, num, moves))
        kept[num] = world.views([NUM_FRAMES - 1], world.path(path), "visibility", 0.02)[0]
    added = kept[3] & ~kept[0]
    last = NUM_FRAMES - 1
    assert added.mean() > 0.03
    assert not (added & moves[last]).any()
    truly = np.zeros(SIZE, bool)
    for s in range(NUM_FRAMES):
        novel = type(cameras[0])(cameras[0].K, path[s] @ cameras[0].w2c, SIZE)
        truly |= visible_from(scene, cameras[last], last / FPS, novel, s / FPS)[0]
    assert truly[added].mean() > 0.93


def test_drawn_masks_follow_the_source():
    _, cameras, frames, z_depth, source, moves = clip()
    config = MaskConfig(num_masks=2, tracking=0, generation=(("orbit", 30.0),))
    still = draw(frames, z_depth, cameras[0].K, config, 3)
    again = draw(frames, z_depth, cameras[0].K, config, 3, None, SourceMotion(source, "keep", FPS, 0, moves))
    assert np.array_equal(still.visible, again.visible)
    moved = draw(frames, z_depth, cameras[0].K, config, 3, None, SourceMotion(source, "remove", FPS, 2, moves))
    assert moved.generation[0, -1] != still.generation[0, -1]
    assert moved.visible[:, 0].all()
