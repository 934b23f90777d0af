"""Conditions with imperfect geometry: the errors have the requested size and depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.errors import BadSample
from ex4d.geometry import imperfect, trajectory
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

SIZE = (80, 80)


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    config = SyntheticConfig(num_frames=4, size=SIZE, seed=1)
    made, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(made, cameras, config.fps)
    w2c = trajectory.build("orbit", 4, 40, radius=trajectory.radius_of(z_depth[0]))
    return frames, z_depth, cameras[0].K, w2c


def error(frames: np.ndarray, cond_video: np.ndarray, visible: np.ndarray) -> float:
    return float(np.abs(frames[1:].astype(float) - cond_video[1:])[visible[1:]].mean())


def test_errors_grow_with_the_jitter_and_vanish_without(scene):
    frames, z_depth, K, w2c = scene
    levels = [(0.0, 0.0), (0.02, 3.0), (0.08, 8.0)]
    made = [imperfect.condition(frames, z_depth, K, w2c, 0, *level) for level in levels]
    errors = [error(frames, *pair) for pair in made]
    assert errors[0] < 2.0
    assert errors[0] < errors[1] < errors[2]
    for cond_video, visible in made:
        np.testing.assert_array_equal(cond_video[0], frames[0])
        assert visible[0].all()
        assert 0.2 < visible[1:].mean() < 1
        assert not cond_video[~visible].any()


def test_it_is_seeded(scene):
    frames, z_depth, K, w2c = scene
    first, second, other = (imperfect.condition(frames, z_depth, K, w2c, seed) for seed in (3, 3, 4))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[0].tobytes() != other[0].tobytes()


def test_the_distortion_has_the_size_asked_for(scene):
    z_depth = np.full((2, *SIZE), 3.0, np.float32)
    wrong = imperfect.degrade(z_depth, np.random.default_rng(0), jitter=0.05, blur_px=0.0)
    assert 0.02 < np.std(np.log(wrong / z_depth)) < 0.07
    np.testing.assert_array_equal(wrong[0], wrong[1])
    edge = z_depth.copy()
    edge[:, :, 40:] = 6.0
    smeared = imperfect.degrade(edge, np.random.default_rng(0), jitter=0.0, blur_px=8.0)
    assert 3.5 < smeared[0, 40, 40] < 5.5
    assert smeared[0, 40, 10] == pytest.approx(3.0, rel=1e-3)


def test_shapes_must_agree(scene):
    frames, z_depth, K, w2c = scene
    with pytest.raises(BadSample, match="depth_shape"):
        imperfect.condition(frames, z_depth, K, w2c[:2], 0)
