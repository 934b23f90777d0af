"""Static surfaces of other frames in the novel view, compared with what the new camera really sees."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.errors import ConfigError
from ex4d.evaluate.metrics import psnr
from ex4d.geometry import camera, camera_path, trajectory
from ex4d.geometry.camera import Camera
from ex4d.geometry.profiles import profile_of
from ex4d.geometry.render import persistent, render, warp_video
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

SIZE, NUM_FRAMES, FPS = (64, 64), 9, 4.0


def world(seed: int, moving_bodies: bool = False):
    """Return (scene, source cameras, frames, z_depth, source w2c [T, 4, 4], orbit w2c [T, 4, 4])."""
    config = SyntheticConfig(
        num_frames=NUM_FRAMES, size=SIZE, fps=FPS, seed=seed, camera_motion="strong", moving_bodies=moving_bodies
    )
    scene, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(scene, cameras, FPS, 2)
    w2c = trajectory.build("orbit", NUM_FRAMES, 30.0, trajectory.radius_of(z_depth[0]))
    return scene, cameras, frames, z_depth, np.stack([camera.w2c for camera in cameras]), w2c


def moving_mask(scene, cameras, first: int = 0) -> np.ndarray:
    """Return bool [T, H, W]: pixels of a body, all of which move; the room is last.

    Args:
        first: frame of the first camera.
    """
    masks = []
    for t, view in enumerate(cameras, first):
        rays = np.linalg.inv(view.w2c)
        grid = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1).reshape(-1, 2)
        local = np.concatenate([grid, np.ones((len(grid), 1))], axis=1) @ np.linalg.inv(view.K).T
        _, index, _ = scene.cast(rays[None, :3, 3], local @ rays[:3, :3].T, t / FPS)
        masks.append((index < len(scene.bodies) - 1).reshape(SIZE))
    return np.stack(masks)


def test_holes_fall_and_what_is_added_is_true():
    before, after, gained, shown = [], [], [], []
    for seed in range(3):
        scene, cameras, frames, z_depth, source, w2c = world(seed)
        K = cameras[0].K
        cond, visible = warp_video(frames, z_depth, K, w2c, source_w2c=source)
        filled, seen = persistent.fill(cond, visible, frames, z_depth, K, w2c, source, 4)
        truth = scene.render(Camera(K, w2c[-1], SIZE), (NUM_FRAMES - 1) / FPS, 2)[0]
        before.append((~visible[-1]).mean())
        after.append((~seen[-1]).mean())
        gained.append(psnr(filled[-1], truth, seen[-1] & ~visible[-1]))
        shown.append(psnr(filled[-1], truth, seen[-1]) - psnr(cond[-1], truth, visible[-1]))
        assert (filled[visible] == cond[visible]).all()
        assert (seen | ~visible).all()
    print(f"holes {np.mean(before):.3f} to {np.mean(after):.3f}, {np.mean(gained):.1f} dB, {np.mean(shown):+.1f} dB")
    assert np.mean(after) < 0.85 * np.mean(before)
    assert np.mean(gained) > 23
    assert np.mean(shown) > -1.5


def test_what_moves_leaves_no_ghost():
    ghosts, without, bodies = 0, 0, 0
    for seed in range(2):
        scene, cameras, frames, z_depth, source, w2c = world(seed, moving_bodies=True)
        K, mask = cameras[0].K, moving_mask(scene, cameras)
        novel = Camera(K, w2c[-1], SIZE)
        cond, visible = warp_video(frames, z_depth, K, w2c, source_w2c=source)
        body = moving_mask(scene, [novel], NUM_FRAMES - 1)[0]
        for moves in (mask, None):
            seen = persistent.fill(cond, visible, frames, z_depth, K, w2c, source, 4, moves)[1]
            added = int((seen[-1] & ~visible[-1] & body).sum())
            ghosts, without = (ghosts + added, without) if moves is not None else (ghosts, without + added)
        bodies += int(body.sum())
    print(
        f"{ghosts / bodies:.2%} of the bodies are covered by what other frames saw, {without / bodies:.2%} without mask"
    )
    assert ghosts <= 0.02 * bodies
    assert without > 5 * ghosts


def test_a_plane_at_a_grazing_angle_is_no_edge_and_a_blurred_edge_is_one():
    rows, columns = np.mgrid[0:40, 0:40].astype(float)
    floor = 0.02 + 0.02 * rows  # 1/z of a plane: it doubles from pixel to pixel at its far end
    assert persistent.on_planes(floor)[:, 2:-2, 2:-2].all()
    for width in (1, 3):
        edge = 0.5 + 0.5 * np.clip((columns - 20) / width, 0, 1)
        assert not persistent.on_planes(edge)[:, :, 20 : 20 + width].any()


def test_pixels_at_the_border_are_shown_by_the_larger_mesh():
    frame = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8)
    z_depth, K, still = np.full((1, 24, 24), 2.0, np.float32), camera.intrinsics((24, 24)), np.eye(4)[None]
    world = persistent.World(frame, z_depth, K, still, 0, None, None, profile_of("default"), "cpu")
    seen = render(world.mesh(0), Camera(K, np.eye(4), (24, 24)), "cpu")
    # By the top-left rule the last row and column belong to the faces behind them.
    assert seen.visible_mask[:-1, :-1].all()
    assert (seen.colour[:-1, :-1] == frame[0, :-1, :-1]).all()
    np.testing.assert_allclose(persistent.extended(1 / z_depth[0].astype(float)), 0.5)


def test_frames_are_spread_and_the_nearest_comes_first():
    assert persistent.others(0, 9, 2) == [4, 8]
    assert persistent.others(4, 9, 4) == [2, 6, 0, 8]
    assert persistent.others(3, 4, 9) == [2, 1, 0]
    with pytest.raises(ConfigError, match="persistent_frames"):
        persistent.fill(*([np.zeros((1, 4, 4))] * 7), -1)


def test_twice_the_same_bits():
    _, cameras, frames, z_depth, source, w2c = world(2)
    K = cameras[0].K
    cond, visible = warp_video(frames, z_depth, K, w2c, source_w2c=source)
    first, second = (persistent.fill(cond, visible, frames, z_depth, K, w2c, source, 2) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_motions_of_the_source_camera():
    _, _, _, _, source, path = world(3)
    still = np.tile(np.eye(4), (NUM_FRAMES, 1, 1))
    np.testing.assert_allclose(camera_path.with_source(path, source, "remove", FPS), path)
    np.testing.assert_allclose(camera_path.with_source(still, source, "keep", FPS), source)
    shake = np.random.default_rng(0).normal(0, 0.02, (NUM_FRAMES, 3))
    shake[[0, -1]] = 0
    shaken = source.copy()
    shaken[:, :3, 3] += shake
    smooth = camera_path.with_source(still, shaken, "smooth", FPS)
    np.testing.assert_allclose(smooth[[0, -1]], shaken[[0, -1]], atol=1e-6)
    rough = [np.abs(np.diff(np.linalg.inv(poses)[:, :3, 3], 2, axis=0)).mean() for poses in (shaken, smooth)]
    assert rough[1] < 0.5 * rough[0]
    with pytest.raises(ConfigError, match="source_motion"):
        camera_path.with_source(path, source, "drop", FPS)
