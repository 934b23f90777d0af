"""Cameras from COLMAP against true ones: moving cameras are found; static and rotating ones get no translation."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ex4d.depth import DepthRequest, Geometry, bundle, colmap, foreign, source_cameras
from ex4d.errors import BadSample, ConfigError, Filtered
from ex4d.geometry.camera import Camera, invert
from ex4d.reconstruct_config import ReconstructConfig
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

pytest.importorskip("pycolmap")
REQUEST = DepthRequest(cameras="colmap")


@pytest.fixture(autouse=True, scope="module")
def none_left():
    yield
    foreign.release()


def filmed(seed: int, size: int = 96, motion: str = "strong", moving_bodies: bool = False, turn_deg: float = 0.0):
    """Return (frames, z_depth, w2c [T, 4, 4] relative to the first) of 9 frames; with `turn_deg` it only turns."""
    config = SyntheticConfig(
        num_frames=9, size=(size, size), seed=seed, camera_motion=motion, moving_bodies=moving_bodies, supersample=1
    )
    scene, path = clip_scene(config, 0)
    if turn_deg:
        turns = Rotation.from_euler(
            "yx", [[turn_deg * share, 4 * share] for share in np.linspace(0, 1, 9)], degrees=True
        )
        eyes = np.tile(path[0].w2c, (9, 1, 1))
        eyes[:, :3] = turns.as_matrix() @ eyes[:, :3]
        path = [Camera(path[0].K, w2c, (size, size)) for w2c in eyes]
    frames, z_depth = render_clip(scene, path, 8.0)
    return frames, z_depth, np.stack([camera.w2c for camera in path]) @ path[0].c2w


def exact(z_depth: np.ndarray, K: np.ndarray | None = None) -> Geometry:
    return Geometry(z_depth, "z_depth", K)


def relative(z_depth: np.ndarray) -> Geometry:
    """Return the output of a relative-disparity network: 1/z up to scale and shift."""
    inverse = 1 / z_depth
    return Geometry(((inverse - 0.5 * inverse.min()) / inverse.max()).astype(np.float32), "disparity")


def errors(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return (mean rotation error in degrees; RMS of the centres in shares of the path, after the best scale)."""
    turns = Rotation.from_matrix(found[:, :3, :3].swapaxes(1, 2) @ truth[:, :3, :3]).magnitude()
    a, b = (invert(poses)[:, :3, 3] for poses in (found, truth))
    left = b - a * float((a * b).sum() / max(float((a * a).sum()), 1e-12))
    path = float(np.linalg.norm(np.diff(b, axis=0), axis=1).sum())
    return float(np.degrees(turns[1:].mean())), float(np.sqrt(np.square(left).sum(axis=1).mean()) / path)


@pytest.mark.parametrize("moving_bodies", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_a_moving_camera_is_found_in_the_unit_of_the_depth(moving_bodies: bool):
    frames, z_depth, truth = filmed(4, 128, moving_bodies=moving_bodies)
    result = source_cameras.joined(exact(z_depth), frames, REQUEST)
    rotation, translation = errors(result.w2c, truth)
    assert rotation < 0.6
    assert translation < 0.05
    extent = [float(np.linalg.norm(invert(poses)[-1, :3, 3])) for poses in (result.w2c, truth)]
    assert extent[0] == pytest.approx(extent[1], rel=0.2 if moving_bodies else 0.1)
    assert result.provenance["cameras"] == "colmap"
    assert result.provenance["camera_depth_error"] < 0.15
    again = source_cameras.joined(exact(z_depth), frames, REQUEST)
    np.testing.assert_array_equal(again.w2c, result.w2c)


@pytest.mark.heavy
def test_relative_disparity_gets_its_unit_from_the_cameras():
    frames, z_depth, truth = filmed(4, 128)
    result = source_cameras.joined(relative(z_depth), frames, REQUEST)
    assert result.kind == "z_depth"
    assert errors(result.w2c, truth)[0] < 1.5
    ratio = result.values / z_depth
    assert np.percentile(ratio, 90) / np.percentile(ratio, 10) < 1.3


@pytest.mark.parametrize("depth", [exact, relative])
@pytest.mark.parametrize("turn_deg", [0.0, 12.0])
def test_a_camera_that_rests_or_turns_gets_no_translation(depth, turn_deg: float, monkeypatch):
    def never(*_):
        raise AssertionError("COLMAP is asked")

    monkeypatch.setattr(colmap, "cameras", never)
    frames, z_depth, truth = filmed(1, 96, "static", turn_deg=turn_deg)
    result = source_cameras.joined(depth(z_depth), frames, REQUEST)
    assert np.abs(result.w2c[:, :3, 3]).max() == 0
    turns = Rotation.from_matrix(result.w2c[:, :3, :3].swapaxes(1, 2) @ truth[:, :3, :3]).magnitude()
    assert np.degrees(turns.mean()) < 0.6


def scattered(seed: int = 0) -> bundle.Matches:
    """Return random matches that no camera motion explains."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(3) for j in range(3) if i != j])
    places = rng.uniform(-60, 60, (3, 30, 2))
    return bundle.Matches(places, pairs, rng.uniform(-60, 60, (len(pairs), 30, 2)), np.ones((len(pairs), 30)))


def test_what_cannot_be_placed_is_refused_and_the_worker_goes_on():
    for _ in range(2):
        with pytest.raises(BadSample, match="COLMAP places 0 of 3 frames") as caught:
            colmap.cameras(scattered(), (128, 128), 120.0, True)
        assert caught.value.reason == "cameras_missing"
    assert len([worker for worker in foreign._workers.values() if worker.process.poll() is None]) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "depth_worker_died"),
        ("import time; time.sleep(60)", "depth_worker_timeout"),
        ("return {'kind': 'cameras', 'w2c': np.eye(4), 'K': np.eye(3)}", "depth_worker_answer"),
        ("return {'kind': 'cameras', 'w2c': np.full((3, 4, 4), np.nan), 'K': np.eye(3)}", "cameras_missing"),
        ("return {'kind': 'cameras', 'w2c': np.stack([np.eye(4)] * 3), 'K': -np.eye(3)}", "depth_worker_answer"),
    ],
)
def test_a_worker_that_dies_hangs_or_lies_costs_one_clip(tmp_path, monkeypatch, body: str, reason: str):
    (tmp_path / "colmap.py").write_text(
        f"import numpy as np\n\ndef load(options):\n    pass\n\ndef estimate(*_):\n    {body}\n"
    )
    monkeypatch.setattr(foreign, "ADAPTERS", tmp_path)
    monkeypatch.setattr(foreign, "CLIP_S", 1.0)
    with pytest.raises(BadSample) as caught:
        colmap.cameras(scattered(), (128, 128), 120.0, True)
    assert caught.value.reason == reason


def test_a_missing_package_is_said_before_any_work(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycolmap" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'ex4d-platform\[colmap\]'"):
        ReconstructConfig(cameras="colmap")


def test_the_adapter_needs_numpy_and_colmap_alone():
    source = (foreign.ADAPTERS / "colmap.py").read_text()
    names = {line.split()[1].partition(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert names - {"numpy", "pycolmap"} <= sys.stdlib_module_names


# ---------------------------------------------------------------- heavy


def outcome(frames, geometry: Geometry, cameras: str = "colmap") -> np.ndarray | None:
    try:
        return source_cameras.joined(geometry, frames, DepthRequest(cameras=cameras)).w2c
    except (Filtered, BadSample) as error:
        print(error)
        return None


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("moving_bodies", [False, True])
@pytest.mark.parametrize(("depth", "cameras"), [(exact, "colmap"), (relative, "colmap"), (exact, "parallax")])
def test_twenty_resting_and_turning_cameras_get_no_translation(depth, cameras: str, moving_bodies: bool):
    for seed in range(20):
        turn_deg = float(np.random.default_rng([5, seed]).uniform(6, 24))
        for more in ({"motion": "static"}, {"turn_deg": turn_deg}):
            frames, z_depth, _ = filmed(seed, 128, moving_bodies=moving_bodies, **more)
            w2c = outcome(frames, depth(z_depth), cameras)
            if w2c is not None:
                moved = float(np.linalg.norm(invert(w2c)[:, :3, 3], axis=1).max())
                assert moved <= 0.01 * (float(np.median(z_depth)) if depth is exact else 1.0)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("motion", "most_refused"), [("gentle", 5), ("strong", 2)])
def test_the_cameras_of_twenty_clips(motion: str, most_refused: int):
    """10 clips of each motion at 256², half of them with moving bodies, relative disparity alone."""
    found = {False: [], True: []}
    refused = 0
    for seed in range(10):
        moving_bodies = seed % 2 == 1
        frames, z_depth, truth = filmed(seed, 256, motion, moving_bodies)
        w2c = outcome(frames, relative(z_depth))
        refused += w2c is None
        if w2c is not None:
            found[moving_bodies].append(errors(w2c, truth))
    for moving_bodies, rows in found.items():
        for name, values in zip(("rotation deg", "translation"), np.array(rows).T, strict=True):
            print(motion, moving_bodies, name, np.round(np.percentile(values, [50, 90]), 4))
    print(f"{motion}: {refused} of 10 refused")
    assert refused <= most_refused
    assert np.median([rotation for rotation, _ in found[False]]) < 0.5
    assert np.median([translation for _, translation in found[False]]) < 0.02
