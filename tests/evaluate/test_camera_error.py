"""The camera error of videos with a known camera, and of videos that are off by a known amount."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ex4d import synthetic
from ex4d.evaluate import views
from ex4d.evaluate.camera_error import CameraError, camera_error
from ex4d.geometry.camera import Camera

WORLD = synthetic.SyntheticConfig(num_frames=4, size=(96, 96), seed=900_000)


@pytest.fixture(scope="module", params=[(0, "orbit", 30.0), (1, "orbit", 60.0), (2, "left", 90.0)])
def view_at(request):
    """A view, and the picture of a camera that is rotated by some degrees and shifted by a share of the radius."""
    index, trajectory, angle_deg = request.param
    clip = views.scene_clip(index, WORLD)
    view = views.with_truth(views.along(clip, views.Path(trajectory, angle_deg, {})), index, WORLD)
    scene, cameras = synthetic.clip_scene(WORLD, index)

    def frames(turn_deg: float, shift: float) -> np.ndarray:
        off = np.eye(4)
        off[:3, :3] = Rotation.from_euler("y", turn_deg, degrees=True).as_matrix()
        off[0, 3] = shift * clip.radius
        pairs = zip(view.w2c, cameras, strict=True)
        moved = [Camera(clip.K, off @ step @ camera.w2c, WORLD.size) for step, camera in pairs]
        return synthetic.render_clip(scene, moved, WORLD.fps)[0]

    return view, frames


def test_the_true_view_has_no_error(view_at):
    view, _ = view_at
    found = camera_error(view, view.truth).summary()
    assert found["cameras_found"] == found["cameras_near"] == 1
    assert found["rotation_deg"] < 0.3
    assert found["translation"] < 0.01
    assert found["flow_px"] < 0.3


def test_a_camera_that_is_off_is_measured(view_at):
    view, frames = view_at
    turned = camera_error(view, frames(2.0, 0.0)).summary()
    assert turned["cameras_found"] > 0.5
    assert turned["rotation_deg"] == pytest.approx(2.0, abs=0.4)
    assert turned["flow_px"] > 2
    shifted = camera_error(view, frames(0.0, 0.05)).summary()
    assert shifted["cameras_found"] > 0.5
    assert shifted["translation"] == pytest.approx(0.05, abs=0.012)


def test_another_picture_has_no_camera(view_at):
    view, _ = view_at
    noise = np.random.default_rng(0).integers(0, 256, view.clip.frames.shape, dtype=np.uint8)
    assert camera_error(view, noise).summary()["cameras_found"] == 0
    black = camera_error(view, np.zeros_like(view.clip.frames)).summary()
    assert black["cameras_found"] == 0
    assert black["rotation_deg"] is None


def test_a_camera_far_off_is_not_near_whether_it_is_found_or_not(view_at):
    view, frames = view_at
    found = camera_error(view, frames(8.0, 0.0)).summary()
    assert found["cameras_near"] == 0
    still = camera_error(view, view.clip.frames).summary()  # the path ignored
    assert still["cameras_near"] < 0.5


def test_shares_are_of_all_frames():
    nan = float("nan")
    found = CameraError(np.array([1.0, 3.0, nan, nan]), np.array([0.1, 0.3, nan, nan]), np.full(4, nan)).summary()
    assert (found["cameras_near"], found["cameras_found"], found["rotation_deg"]) == (0.25, 0.5, 2.0)
    assert found["flow_px"] is None
    assert set(CameraError(*np.zeros((3, 0))).summary().values()) == {None}
