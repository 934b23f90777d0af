"""Each clip score on synthetic positives and negatives, and its thresholds."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scenes import grey, pan, texture, written

from ex4d.quality import SCORES, clip, motion
from ex4d.quality.overlay import text_share


def test_every_score_is_finite_repeats_and_is_declared():
    frames = pan(9)
    first, second = clip.measure(frames, 24.0), clip.measure(frames.copy(), 24.0)
    assert first == second
    assert set(first) == {name for name, score in SCORES.items() if score.stage == "score"} - {
        *("bars", "logo", "source_side", "hdr", "interlaced")
    }
    for odd in (np.zeros((1, 32, 32, 3), np.uint8), np.full((2, 16, 640, 3), 255, np.uint8)):
        for name, value in clip.measure(odd, 8.0).items():
            assert isinstance(value, float), name
            assert np.isfinite(value), name


@pytest.mark.parametrize("step", [(3.0, 0.0), (-1.5, 2.0)])
def test_camera_motion_is_the_speed_of_a_pan_and_nothing_moves_besides(step):
    frames = pan(12, step=step)
    scores = clip.measure(frames, 10.0)
    assert scores["camera_motion"] == pytest.approx(np.hypot(*step) * 10 / 256, rel=0.1)
    assert scores["object_motion"] < 0.02
    still = clip.measure(pan(12, step=(0, 0)), 10.0)
    assert still["camera_motion"] < 0.01
    assert still["object_motion"] < 0.02


def test_a_body_on_a_resting_picture_is_object_motion():
    frames, body = pan(12, step=(0, 0)), texture((60, 80), seed=9)
    for t, frame in enumerate(frames):
        frame[40:100, 30 + 6 * t : 110 + 6 * t] = body[..., None]
    scores = clip.measure(frames, 10.0)
    share = 60 * 80 / (144 * 256)
    assert scores["camera_motion"] < 0.02
    assert share / 2 < scores["object_motion"] < 2 * share


def test_the_affine_motion_of_most_is_found_among_others():
    y, x = np.mgrid[0:32, 0:32] / 16 - 1.0
    truth = np.stack([1 + 2 * x - y, 0.5 * y + x], axis=-1)
    flow = truth.copy()
    flow[4:22, 10:26] += (9.0, -4.0)
    found = motion.affine(flow, np.ones((32, 32), bool))
    assert np.abs(found - truth).max() < 0.1


def test_sharpness_falls_with_blur_and_not_with_contrast_or_light():
    image = (np.random.default_rng(0).integers(0, 2, (40, 40)).repeat(6, 0).repeat(6, 1) * 160 + 40).astype(np.uint8)
    sharp = clip.sharpness(image)
    blurred = [clip.sharpness(cv2.GaussianBlur(image, (0, 0), sigma)) for sigma in (1.5, 3, 6)]
    assert sharp > 0.6
    assert sharp > blurred[0] > blurred[1] > blurred[2]
    assert blurred[2] < SCORES["sharpness"].suggested
    assert clip.sharpness((image // 3) + 5) == pytest.approx(sharp, abs=0.05)
    assert clip.sharpness(np.full((40, 40), 9, np.uint8)) == 0.0


def test_still_counts_repeated_frames():
    moving = grey(pan(24))
    slides = np.concatenate([np.repeat(moving[:1], 12, 0), np.repeat(moving[20:21], 12, 0)])
    pulled = moving[np.arange(30) * 4 // 5]
    assert clip.still_share(moving) == 0.0
    assert clip.still_share(slides) == pytest.approx(22 / 23)
    assert clip.still_share(pulled) == pytest.approx(0.2, abs=0.02)
    assert clip.still_share(grey(pan(24, step=(0, 0), noise=3.0))) < 0.1  # a still camera is not a slide-show


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [(2.0, 1.0), (0.0, 0.0)])
def test_text_is_found_over_a_moving_and_a_resting_picture(seed, step):
    frames = pan(8, step=step, seed=seed)
    limit = SCORES["text"].suggested
    assert text_share(grey(frames)) <= limit / 2
    for height, colour in ((0.06, (255, 255, 255)), (0.1, (255, 230, 0))):
        assert text_share(grey(written(frames, height=height, colour=colour))) > limit


def test_text_grows_with_its_lines_and_writing_that_moves_along_is_none():
    frames = pan(8, step=(3.0, 0.0))
    one = text_share(grey(written(frames)))
    assert text_share(grey(written(written(frames), where=0.2))) == pytest.approx(2 * one, rel=0.3)
    sign = written(pan(8, size=(144, 280), step=(0, 0)))
    moving = np.stack([view[:, 3 * t : 3 * t + 256] for t, view in enumerate(sign)])
    assert text_share(grey(moving)) == 0.0
