"""Depth scores on scenes with exact depth, and on the same scenes with errors of known size."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scenes import texture

from ex4d.quality import SCORES, geometry
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

NUM_FRAMES = 13


@pytest.fixture(scope="module", params=[("static", False), ("gentle", True), ("strong", False)], ids=str)
def clip(request):
    motion, sky = request.param
    settings = SyntheticConfig(
        num_frames=NUM_FRAMES, size=(64, 64), camera_motion=motion, sky=sky, supersample=1, max_frequency=8.0, fps=16.0
    )
    return *render_clip(*clip_scene(settings, 1), settings.fps), sky


def test_true_depth_neither_flickers_nor_drifts_and_sky_is_counted(clip):
    frames, z_depth, sky = clip
    scores = geometry.measure(frames, z_depth)
    measured = {name for name, score in SCORES.items() if score.stage == "depth_quality"}
    assert set(scores) == measured - {"depth_holes"}  # the stage counts those; they do not depend on the values
    assert scores["depth_flicker"] < 0.003
    assert scores["depth_drift"] < 0.05
    assert (0.2 < scores["sky"] < 0.8) if sky else scores["sky"] == 0


def test_flicker_is_about_the_noise_that_was_added(clip):
    frames, z_depth, _ = clip
    found = []
    for seed in range(4):
        noise = np.random.default_rng(seed).normal(0, 0.03, (NUM_FRAMES, 1, 1))
        found.append(geometry.measure(frames, (z_depth * np.exp(noise)).astype(np.float32))["depth_flicker"])
    assert np.mean(found) == pytest.approx(0.03, rel=0.4)
    smooth = z_depth * np.exp(0.2 * np.sin(np.arange(NUM_FRAMES) / 6))[:, None, None]
    assert geometry.measure(frames, smooth.astype(np.float32))["depth_flicker"] < 0.006  # it drifts, evenly


@pytest.mark.parametrize("rate", [1.02, 0.98])
def test_drift_is_the_change_of_scale_over_the_clip(clip, rate):
    frames, z_depth, _ = clip
    drifting = z_depth * rate ** np.arange(NUM_FRAMES)[:, None, None]
    truth = abs(np.log(rate)) * (NUM_FRAMES - 1)
    assert geometry.measure(frames, drifting.astype(np.float32))["depth_drift"] == pytest.approx(truth, rel=0.2)


def test_scale_does_not_matter_and_short_clips_say_nothing(clip):
    frames, z_depth, _ = clip
    scores, scaled = geometry.measure(frames, z_depth), geometry.measure(frames, 50 * z_depth)
    assert scaled == pytest.approx(scores, abs=1e-4)
    short = geometry.measure(frames[:2], z_depth[:2])
    assert (short["depth_flicker"], short["depth_drift"]) == (0.0, 0.0)


def test_a_camera_that_comes_nearer_is_no_drift():
    """A wall that fills the picture, 2 % nearer in each frame: depth falls as the picture grows."""
    wall, nearer = texture((96, 96), seed=3).astype(np.float32), 1.02 ** np.arange(NUM_FRAMES)
    frames = [cv2.warpAffine(wall, cv2.getRotationMatrix2D((47.5, 47.5), 0, scale), (96, 96)) for scale in nearer]
    frames = np.repeat(np.stack(frames).astype(np.uint8)[..., None], 3, axis=-1)
    z_depth = np.broadcast_to((2 / nearer)[:, None, None], frames.shape[:3]).astype(np.float32)
    assert geometry.measure(frames, z_depth)["depth_drift"] < 0.04
    assert geometry.measure(frames, np.ones_like(z_depth))["depth_drift"] == pytest.approx(np.log(nearer[-1]), rel=0.2)
