"""Warps from measured depth and poses to a second picture: real pairs, and a pair from a synthetic scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import real_pairs

from ex4d import synthetic
from ex4d.errors import BadSample
from ex4d.geometry.camera import Camera


@pytest.fixture(scope="module")
def pair() -> tuple[real_pairs.View, real_pairs.View]:
    config = synthetic.SyntheticConfig(
        num_frames=9, size=(96, 128), seed=5, moving_bodies=False, camera_motion="strong"
    )
    scene, cameras = synthetic.clip_scene(config, 0)
    return tuple(
        real_pairs.View(*scene.render(camera, 0.0, supersample=3), camera.w2c, camera.K) for camera in cameras[::8]
    )


def test_a_warp_lands_where_the_second_camera_saw_it(pair):
    found = real_pairs.score(*pair)
    assert found.psnr > 24
    assert found.psnr > found.psnr_still + 5
    assert found.psnr_same_surface >= found.psnr
    assert found.coverage > 0.4
    assert found.recall > 0.9
    assert found.depth_error < 0.005
    wrong = real_pairs.score(pair[0], replace(pair[1], w2c=pair[0].w2c))  # a wrong pose
    assert wrong.psnr < found.psnr - 5
    assert wrong.depth_error > 2 * found.depth_error


def test_what_was_not_measured_is_not_marked_visible(pair):
    source, target = pair
    holes = source.z_depth.copy()
    holes[20:60, 30:80] = 0
    whole, found = real_pairs.score(source, target), real_pairs.score(replace(source, z_depth=holes), target)
    assert found.coverage < whole.coverage - 0.05
    assert found.psnr > 30
    with pytest.raises(BadSample, match="depth_missing"):
        real_pairs.score(replace(source, z_depth=holes * 0), target)
    away = np.diag([-1.0, 1, -1, 1]) @ target.w2c
    with pytest.raises(BadSample, match="no_overlap"):
        real_pairs.score(source, replace(target, w2c=away))


def test_a_pose_is_found_from_matches_and_depth():
    noise = np.random.default_rng(0)
    detail = noise.integers(0, 90, (240, 320, 3)).astype(np.uint8)  # corners to match, painted onto a far wall
    K = np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])
    z_depth = np.full((240, 320), 4.0, np.float32)
    shift = np.eye(4)
    shift[0, 3] = -4 * 12 / 300  # twelve pixels to the left
    moved = np.roll(detail, -12, axis=1)
    pose = real_pairs.relative_pose(detail, z_depth, moved, K)
    np.testing.assert_allclose(pose, shift, atol=0.02)
    with pytest.raises(BadSample, match="no_pose"):
        real_pairs.relative_pose(detail, z_depth, noise.integers(0, 90, (240, 320, 3)).astype(np.uint8), K)
    assert Camera(K, pose, (240, 320)).eye[0] == pytest.approx(0.16, abs=0.02)


def test_real_pairs_with_exact_and_with_measured_depth(media):
    """benchmarks/results/warp_real.md holds every pair; two of them here."""
    views = real_pairs.load_icl(media / "rgbd_icl_tum" / "ch12" / "dense_RGBD" / "data")
    found = real_pairs.score(views[1], views[3])
    assert found.psnr > 35
    assert found.psnr > found.psnr_still + 15
    assert found.coverage > 0.65
    assert found.recall > 0.98
    desk = real_pairs.load_tum(media / "rgbd_icl_tum" / "ch7")
    found = real_pairs.score(*desk)
    assert found.psnr > 24
    assert found.psnr > found.psnr_still + 10
    assert found.coverage > 0.5
    assert found.depth_error < 0.015
