"""Cameras from one source with depth from another: scaled to one unit, and measured on exact scenes."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from pose_writers import write
from scipy.spatial.transform import Rotation

from ex4d.depth import DepthRequest, Geometry, source_cameras
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import invert
from ex4d.geometry.pose_file import PoseFile
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

NO_POSES = np.tile(np.eye(4), (2, 1, 1))


@cache
def clip(motion: str = "strong", moving_bodies: bool = False):
    """Return (frames, exact geometry without cameras, true w2c) of seven frames."""
    config = SyntheticConfig(
        num_frames=7, size=(96, 96), seed=2, moving_bodies=moving_bodies, camera_motion=motion, supersample=1
    )
    scene, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(scene, cameras, 8.0)
    return frames, Geometry(z_depth, "z_depth", cameras[0].K), np.stack([camera.w2c for camera in cameras])


def centres(w2c: np.ndarray) -> np.ndarray:
    return invert(w2c)[:, :3, 3]


@pytest.mark.parametrize("moving_bodies", [False, True])
def test_poses_of_another_unit_are_brought_into_that_of_the_depth(tmp_path, moving_bodies: bool):
    frames, exact, w2c = clip(moving_bodies=moving_bodies)
    poses = w2c.copy()
    poses[:, :3, 3] *= 37.0
    write(tmp_path / "poses.json", PoseFile(poses), "json")
    found = source_cameras.joined(exact, frames, DepthRequest(cameras=str(tmp_path / "poses.json")))
    scale = np.linalg.norm(centres(found.w2c)[-1]) / np.linalg.norm(centres(w2c)[-1])
    assert abs(scale - 1) < 0.03
    assert found.provenance["camera_depth_error"] < 0.1
    assert np.array_equal(found.values, exact.values)


def test_relative_disparity_takes_the_unit_of_the_cameras(tmp_path):
    frames, exact, w2c = clip()
    write(tmp_path / "poses.json", PoseFile(w2c), "json")
    relative = dataclasses.replace(exact, values=(3 / exact.values + 0.7).astype(np.float32), kind="disparity")
    found = source_cameras.joined(relative, frames, DepthRequest(cameras=str(tmp_path / "poses.json")))
    assert found.kind == "z_depth"
    assert np.median(np.abs(found.values / exact.values - 1)) < 0.05
    inverted = dataclasses.replace(relative, values=(4 - relative.values).clip(0))
    with pytest.raises(BadSample, match="contradict"):
        source_cameras.joined(inverted, frames, DepthRequest(cameras=str(tmp_path / "poses.json")))


@pytest.mark.parametrize("kind", ["z_depth", "disparity"])
@pytest.mark.parametrize("cameras", ["a file", "parallax"])
def test_filled_holes_have_no_say_in_the_unit(tmp_path, kind, cameras):
    frames, exact, w2c = clip()
    if cameras == "a file":
        write(tmp_path / "poses.json", PoseFile(w2c), "json")
        cameras = str(tmp_path / "poses.json")
    values = exact.values if kind == "z_depth" else (3 / exact.values + 0.7).astype(np.float32)
    valid = np.ones(values.shape, bool)
    valid[:, :, :60] = False  # most of the picture: the median over all pixels would be that of the holes
    results = [
        source_cameras.joined(
            dataclasses.replace(exact, values=np.where(valid, values, filler), kind=kind, valid_mask=valid),
            frames,
            DepthRequest(cameras=cameras),
        )
        for filler in np.array([1.5, 50.0], np.float32)
    ]
    np.testing.assert_array_equal(results[0].w2c, results[1].w2c)
    np.testing.assert_array_equal(results[0].values[valid], results[1].values[valid])
    assert results[0].provenance == results[1].provenance
    nowhere = dataclasses.replace(exact, kind=kind, valid_mask=np.zeros(values.shape, bool))
    with pytest.raises(BadSample, match="cameras_missing"):
        source_cameras.joined(nowhere, frames, DepthRequest(cameras=cameras))


def test_wrong_cameras_show_in_the_score(tmp_path):
    frames, exact, w2c = clip()
    write(tmp_path / "right.json", PoseFile(w2c), "json")
    write(tmp_path / "wrong.json", PoseFile(w2c[::-1]), "json")
    right, wrong = (
        source_cameras.joined(exact, frames, DepthRequest(cameras=str(tmp_path / f"{name}.json"))).provenance
        for name in ("right", "wrong")
    )
    assert wrong["camera_depth_error"] > 2 * right["camera_depth_error"]


@pytest.mark.parametrize(("moving_bodies", "limit"), [(False, 0.05), (True, 0.2)])
def test_parallax_gives_cameras_to_depth_that_has_none(moving_bodies: bool, limit: float):
    frames, exact, w2c = clip(moving_bodies=moving_bodies)
    found = source_cameras.joined(exact, frames, DepthRequest(cameras="parallax"))
    moved, truth = centres(found.w2c)[-1], centres(w2c)[-1]
    assert np.linalg.norm(moved - truth) < limit * np.linalg.norm(truth)
    turned = Rotation.from_matrix(found.w2c[:, :3, :3].swapaxes(1, 2) @ w2c[:, :3, :3]).magnitude()
    assert np.degrees(turned.max()) < 2  # at 96 px, where flow is coarse; benchmarks/source_cameras.py has 256
    assert found.provenance["cameras"] == "parallax"
    assert found.provenance["camera_depth_error"] < 0.3


def test_relative_disparity_gets_cameras_and_becomes_depth():
    frames, exact, w2c = clip()
    relative = Geometry((3 / exact.values + 0.7).astype(np.float32), "disparity")
    found = source_cameras.joined(relative, frames, DepthRequest(cameras="parallax"))
    moved, truth = centres(found.w2c)[-1], centres(w2c)[-1]
    assert moved @ truth > 0.99 * np.linalg.norm(moved) * np.linalg.norm(truth)
    assert np.corrcoef(found.values.ravel(), exact.values.ravel())[0, 1] > 0.8
    assert abs(2 * np.degrees(np.arctan(48 / found.K[0, 0])) - 54) < 12


def test_a_camera_that_stands_among_moving_bodies_is_said_to_stand():
    frames, exact, _ = clip("static", True)
    found = source_cameras.joined(exact, frames, DepthRequest(cameras="parallax"))
    assert np.abs(centres(found.w2c)).max() <= 0.01 * np.median(exact.values)
    assert np.abs(found.w2c[:, :3, :3] - np.eye(3)).max() < 0.01


def test_what_the_estimator_gives_is_used_left_or_missed():
    frames, exact, w2c = clip()
    told = dataclasses.replace(exact, w2c=w2c)
    assert source_cameras.joined(told, frames, DepthRequest()).provenance["cameras"] == "estimator"
    assert source_cameras.joined(exact, frames, DepthRequest()).provenance["cameras"] == "none"
    assert source_cameras.joined(told, frames, DepthRequest(cameras="none")).w2c is None
    with pytest.raises(BadSample, match="cameras_missing"):
        source_cameras.joined(exact, frames, DepthRequest(cameras="estimator"))


def test_other_choices_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cameras"):
        source_cameras.joined(clip()[1], clip()[0], DepthRequest(cameras="sfm"))
    write(tmp_path / "short.json", PoseFile(NO_POSES), "json")
    with pytest.raises(BadSample, match="2 poses"):
        source_cameras.joined(clip()[1], clip()[0], DepthRequest(cameras=str(tmp_path / "short.json")))
