"""Cameras: axes, pixel centres, inverses, rejected input."""

from __future__ import annotations

import numpy as np
import pytest
from sight import project

from ex4d.errors import ConfigError
from ex4d.geometry.camera import Camera, intrinsics, invert, look_at, pixel_rays, relative_to, unproject


def test_axes_are_opencv():
    camera = Camera(intrinsics((100, 200)), look_at(np.zeros(3), np.array([0, 0, 1.0])), (100, 200))
    assert np.allclose(camera.w2c, np.eye(4))
    uv, z = project(np.array([[0, 0, 2.0], [0.1, 0, 2.0], [0, 0.1, 2.0], [0, 0, -1.0]]), camera)
    assert np.allclose(uv[0], (100, 50))
    assert uv[1, 0] > 100  # x is to the right
    assert uv[2, 1] > 50  # y is down
    assert np.isnan(uv[3]).all()
    assert z[3] == -1


@pytest.mark.parametrize("seed", range(5))
def test_look_at_is_a_rotation_that_centres_the_target(seed):
    rng = np.random.default_rng(seed)
    eye, target = rng.standard_normal(3), rng.standard_normal(3)
    w2c = look_at(eye, target)
    assert np.allclose(w2c[:3, :3] @ w2c[:3, :3].T, np.eye(3))
    assert np.isclose(np.linalg.det(w2c[:3, :3]), 1)
    camera = Camera(intrinsics((64, 64)), w2c, (64, 64))
    uv, z = project(target, camera)
    assert np.allclose(uv, (32, 32))
    assert np.isclose(z, np.linalg.norm(target - eye))
    assert np.allclose(camera.eye, eye)
    above, _ = project(target + np.array([0, -0.01, 0]), camera)
    assert above[1] < 32  # −y is up in the picture


def test_unproject_and_project_are_inverse_at_pixel_centres():
    K = intrinsics((4, 6), fov_deg=70)
    z_depth = np.random.default_rng(0).uniform(1, 9, (4, 6))
    uv, z = project(unproject(z_depth, K), Camera(K, np.eye(4), (4, 6)))
    row, column = np.mgrid[:4, :6]
    assert np.allclose(uv, np.stack([column + 0.5, row + 0.5], -1))
    assert np.allclose(z, z_depth)
    assert np.allclose(pixel_rays((4, 6), K)[..., 2], 1)


def test_intrinsics_cover_the_stated_angle():
    K = intrinsics((100, 200), fov_deg=60)
    assert np.isclose(np.degrees(2 * np.arctan(100 / K[0, 0])), 60)
    assert abs(intrinsics((512, 512))[0, 0] - 500) < 3  # the released focal length


def test_relative_to_moves_the_world_into_the_source_camera():
    source, other = look_at([1, 2, 3], [0, 0, 9]), look_at([2, 2, 2], [0, 1, 9])
    assert np.allclose(relative_to(source, source), np.eye(4))
    point = np.array([0.3, 0.2, 5, 1])
    assert np.allclose(relative_to(other, source) @ (source @ point), other @ point)
    assert np.allclose(invert(np.stack([source, other]))[1] @ other, np.eye(4))


def test_bad_cameras_are_refused():
    K, pose = intrinsics((8, 8)), np.eye(4)
    mirrored = np.diag([1.0, 1, -1, 1])
    flipped = K * [[1], [-1], [1]]
    skewed = K + np.eye(3, k=1)
    for bad_K, bad_pose in (
        (K, mirrored),
        (K, pose * 2),
        (flipped, pose),
        (skewed, pose),
        (K[:2], pose),
        (K * np.nan, pose),
    ):
        with pytest.raises(ConfigError):
            Camera(bad_K, bad_pose, (8, 8))
    with pytest.raises(ConfigError):
        look_at([0, 0, 0], [0, 1, 0])
    with pytest.raises(ConfigError):
        intrinsics((8, 8), fov_deg=0)


@pytest.mark.parametrize(("focal", "centre"), [(1e300, 32.0), (1e-300, 32.0), (0.1, 32.0), (1e5, 32.0), (60.0, 1e5)])
def test_a_lens_that_no_camera_has_is_refused(focal, centre):
    """Rendering such a picture would never end, or would kill the process."""
    K = np.array([[focal, 0, centre], [0, focal, 32.0], [0, 0, 1]])
    with pytest.raises(ConfigError, match=r"camera\.K"):
        Camera(K, np.eye(4), (64, 64))
