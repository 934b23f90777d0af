"""Camera paths: formulas, spans, the released example."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry import trajectory

OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
BUILDABLE = [name for name in trajectory.TRAJECTORIES if name != "custom"]


def eyes(w2c: np.ndarray) -> np.ndarray:
    return np.linalg.inv(w2c)[:, :3, 3]


def yaw_deg(w2c: np.ndarray) -> np.ndarray:
    forward = w2c[:, 2, :3]
    return np.degrees(np.arctan2(-forward[:, 0], forward[:, 2]))


@pytest.mark.parametrize("name", BUILDABLE)
@pytest.mark.parametrize("num_frames", [1, 2, 9, 50])
def test_every_path_is_rigid_and_starts_at_the_source(name: str, num_frames: int):
    w2c = trajectory.build(name, num_frames, radius=2.5)
    rotation = w2c[:, :3, :3]
    assert w2c.shape == (num_frames, 4, 4)
    np.testing.assert_allclose(w2c[0], np.eye(4), atol=1e-12)
    np.testing.assert_allclose(
        rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (num_frames, 1, 1)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-12)


@pytest.mark.parametrize("name", BUILDABLE)
def test_radius_only_scales_the_path(name: str):
    small, large = trajectory.build(name, 9, radius=1.0), trajectory.build(name, 9, radius=7.0)
    np.testing.assert_allclose(small[:, :3, :3], large[:, :3, :3], atol=1e-12)
    np.testing.assert_allclose(7 * small[:, :3, 3], large[:, :3, 3], atol=1e-12)


@pytest.mark.parametrize("name", ["orbit", "full", "lateral", "left", "right", "arc", "crane", "spiral"])
def test_paths_that_turn_keep_the_target_on_the_axis(name: str):
    w2c = trajectory.build(name, 17, 40.0, radius=3.0)
    target = w2c @ np.array([0, 0, 3.0, 1])
    np.testing.assert_allclose(target[:, :2], 0, atol=1e-12)
    assert (target[:, 2] > 0).all()


@pytest.mark.parametrize("num_frames", [2, 9, 49, 81])
@pytest.mark.parametrize("angle_deg", [30.0, 60.0, 90.0])
def test_orbit_spans_the_stated_angle_at_any_length(num_frames: int, angle_deg: float):
    w2c = trajectory.build("orbit", num_frames, angle_deg, radius=2.0)
    phi = np.radians(angle_deg)
    np.testing.assert_allclose(yaw_deg(w2c)[-1], angle_deg, atol=1e-9)
    expected = [2 * np.sin(phi), 0.4 * (np.cos(phi) - 1), 2 - 2 * np.cos(phi)]
    np.testing.assert_allclose(eyes(w2c)[-1], expected, atol=1e-12)


def test_full_at_90_is_the_released_outer_sweep():
    phi = np.linspace(0, 2 * np.pi, 49)
    expected = 3 * np.stack([np.sin(phi), 0.2 * (np.cos(phi) - 1), 1 - np.abs(np.cos(phi))], axis=1)
    np.testing.assert_allclose(eyes(trajectory.build("full", 49, 90, radius=3.0)), expected, atol=1e-12)


def test_left_mirrors_right():
    left, right = (eyes(trajectory.build(name, 9, 60)) for name in ("left", "right"))
    np.testing.assert_allclose(left * [-1, 1, 1], right, atol=1e-12)


def test_released_180_is_a_slide_of_45_degrees_of_yaw():
    w2c = trajectory.build("released-180", 49, radius=2.0)
    assert abs(yaw_deg(w2c).max() - 45) < 1e-9
    assert abs(yaw_deg(w2c).min() + 45) < 1e-9
    np.testing.assert_allclose(eyes(w2c)[:, 2], 0, atol=1e-12)


def test_released_180_equals_the_released_poses(media):
    released = np.load(media / "ex4d_flower" / "camera_180.npz", allow_pickle=False)["extrinsics"].astype(np.float64)
    opencv = OPENGL @ released
    radius = eyes(opencv)[12, 0]  # phi = 90 degrees: x = r
    np.testing.assert_allclose(trajectory.build("released-180", 49, radius=radius), opencv, atol=1e-5)


def test_dolly_spiral_and_crane_move_as_they_say():
    np.testing.assert_allclose(eyes(trajectory.build("dolly", 5, radius=4.0, distance=0.25))[-1], [0, 0, 1])
    spiral = eyes(trajectory.build("spiral", 33, 20, radius=1.0, turns=1.0))
    assert np.all(np.diff(np.linalg.norm(spiral, axis=1)) > 0)
    crane = eyes(trajectory.build("crane", 9, 45, radius=1.0))
    np.testing.assert_allclose(crane[-1], [0, -np.sqrt(0.5), 1 - np.sqrt(0.5)], atol=1e-12)


def test_zoom_scales_only_the_focal_lengths():
    K = np.array([[100.0, 0, 48], [0, 110, 40], [0, 0, 1]])
    zoomed = trajectory.zoom_intrinsics(K, 5, zoom=4.0)
    np.testing.assert_allclose(zoomed[:, 0, 0], 100 * np.array([1, np.sqrt(2), 2, np.sqrt(8), 4]))
    np.testing.assert_allclose(zoomed[:, 1, 1] / zoomed[:, 0, 0], 1.1)
    np.testing.assert_array_equal(zoomed[:, :2, 2], np.tile([48, 40], (5, 1)))


def test_spline_passes_through_its_keys_and_turns_smoothly():
    keys = trajectory.build("orbit", 4, 60, radius=1.0)
    path = trajectory.build("custom", 31, radius=2.0, key_poses=keys)
    np.testing.assert_allclose(eyes(path)[::10], 2 * eyes(keys), atol=1e-9)
    np.testing.assert_allclose(path[::10, :3, :3], keys[:, :3, :3], atol=1e-9)
    assert np.diff(yaw_deg(path)).min() > 0


def test_radius_follows_the_depth():
    z_depth = np.linspace(2, 10, 96 * 96, dtype=np.float32).reshape(96, 96)
    assert trajectory.radius_of(3 * z_depth) == pytest.approx(3 * trajectory.radius_of(z_depth))
    assert trajectory.radius_of(z_depth) == pytest.approx(1.06 * 2.08, rel=1e-3)
    assert trajectory.radius_of(z_depth, rule="released") == pytest.approx(z_depth[1:-1, 1:-1].min() + 0.15)
    z_depth[0, 5] = 0.1  # on the ring, which the released code pushes back before it looks
    assert trajectory.radius_of(z_depth, rule="released") == pytest.approx(z_depth[1:-1, 1:-1].min() + 0.15)
    with pytest.raises(BadSample, match="depth_nan"):
        trajectory.radius_of(np.full((4, 4), np.nan))


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("wobble", {}, "trajectory"),
        ("orbit", {"angle_deg": 120}, "angle_deg"),
        ("orbit", {"turns": 2}, "turns"),
        ("dolly", {"distance": 1.5}, "distance"),
        ("orbit", {"radius": 0.0}, "radius"),
        ("orbit", {"num_frames": 0}, "num_frames"),
    ],
)
def test_bad_choices_name_their_key(name: str, options: dict, key: str):
    with pytest.raises(ConfigError) as caught:
        trajectory.build(name, **{"num_frames": 9, **options})
    assert caught.value.key == key


def test_a_path_through_poses_needs_poses():
    with pytest.raises(ConfigError, match="key_poses"):
        trajectory.build("custom", 9)
