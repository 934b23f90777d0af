"""Depth: bounds, robustness, reasons for rejection, alignment."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.depth import RELEASED_MAPPING, align_clip, align_scale_shift, to_z_depth

RNG = np.random.default_rng(0)
CLIP = RNG.uniform(2, 20, (3, 16, 20))


def test_metric_depth_is_kept_and_sky_is_bounded():
    values = CLIP.copy()
    values[:, :4] = np.inf
    values[:, 4] = 1e6
    z_depth = to_z_depth(values, "z_depth")
    assert z_depth.dtype == np.float32
    assert np.allclose(z_depth[:, 5:], values[:, 5:], rtol=1e-6)
    near = 1 / np.percentile(1 / values, 99)
    assert np.allclose(z_depth[:, :5], 100 * near, rtol=1e-6)


def test_scaling_metric_depth_scales_the_result():
    assert np.allclose(to_z_depth(CLIP * 7, "z_depth"), 7 * to_z_depth(CLIP, "z_depth"), rtol=1e-6)


def test_metric_disparity_is_its_inverse():
    assert np.allclose(to_z_depth(1 / CLIP, "disparity", metric=True), CLIP, rtol=1e-6)


def test_relative_disparity_does_not_depend_on_scale_and_shift_nor_on_one_wild_pixel():
    disparity = 1 / CLIP
    plain = to_z_depth(disparity, "disparity")
    assert np.allclose(to_z_depth(5 * disparity - 2, "disparity"), plain, rtol=1e-4)
    wild = disparity.copy()
    wild[0, 0, 0] = 1e4
    changed = to_z_depth(wild, "disparity")
    assert np.median(np.abs(changed / plain - 1)) < 0.02
    assert np.isfinite(changed).all()
    assert changed.min() > 0.6


def test_released_mapping_is_the_released_formula():
    disparity = RNG.uniform(0, 1, (2, 8, 8))
    disparity[0, 0, 0], disparity[0, 0, 1] = 0, 1
    expected = np.clip(10000 / np.maximum(3900 * disparity, 1e-5), 1e-4, 1e4)
    assert np.allclose(to_z_depth(disparity, "disparity", **RELEASED_MAPPING), expected, rtol=1e-5)


def test_a_float16_and_an_integer_array_are_taken():
    assert to_z_depth(CLIP.astype(np.float16), "z_depth").dtype == np.float32
    assert to_z_depth((CLIP * 1000).astype(np.uint16), "z_depth").max() > 1000


def broken(value: float) -> np.ndarray:
    values = CLIP.copy()
    values[1, 2, 3] = value
    return values


@pytest.mark.parametrize(
    ("values", "kind", "metric", "reason"),
    [
        (broken(np.nan), "z_depth", False, "depth_nan"),
        (broken(np.nan), "disparity", False, "depth_nan"),
        (broken(np.inf), "disparity", False, "depth_nan"),
        (broken(0), "z_depth", False, "depth_nonpositive"),
        (broken(-1), "z_depth", False, "depth_nonpositive"),
        (broken(-np.inf), "z_depth", False, "depth_nonpositive"),
        (broken(-1), "disparity", True, "depth_nonpositive"),
        (np.full((2, 4, 4), 3.0), "z_depth", False, "depth_constant"),
        (np.full((2, 4, 4), np.inf), "z_depth", False, "depth_constant"),
        (np.zeros((2, 4, 4)), "disparity", False, "depth_constant"),
        (CLIP[0], "z_depth", False, "depth_shape"),
        (CLIP[:0], "z_depth", False, "depth_shape"),
        (CLIP.astype(complex), "z_depth", False, "depth_shape"),
        (np.array([[["a"]]]), "z_depth", False, "depth_shape"),
    ],
)
def test_what_is_no_depth_is_refused_with_its_reason(values, kind, metric, reason):
    with pytest.raises(BadSample) as caught:
        to_z_depth(values, kind, metric=metric)
    assert caught.value.reason == reason


def test_the_kind_is_checked():
    with pytest.raises(ConfigError):
        to_z_depth(CLIP, "depth")


def test_align_scale_shift_recovers_both():
    source = RNG.uniform(0, 1, (20, 20))
    target = 3 * source - 0.5
    target[:, :3] = np.inf
    target[5, 5] = np.nan
    assert np.allclose(align_scale_shift(source, target), (3, -0.5))
    with pytest.raises(BadSample, match="depth_constant"):
        align_scale_shift(np.ones(9), np.arange(9.0))
    with pytest.raises(BadSample, match="depth_constant"):
        align_scale_shift(np.arange(9.0), -np.arange(9.0))
    with pytest.raises(BadSample, match="depth_shape"):
        align_scale_shift(np.ones(9), np.ones(8))


def test_align_clip_does_not_drift_with_noise_and_ignores_a_moving_object():
    rng = np.random.default_rng(1)
    truth = np.repeat(rng.uniform(0.1, 0.6, (1, 32, 40)), 40, 0)
    for t in range(40):
        truth[t, 8:16, t % 30 : t % 30 + 8] = 0.9
    noisy = truth + rng.normal(0, 0.01, truth.shape)
    scale, shift = rng.uniform(0.5, 2, 40), rng.uniform(-0.3, 0.3, 40)
    scale[0], shift[0] = 1, 0
    aligned = align_clip(noisy * scale[:, None, None] + shift[:, None, None])
    last = align_scale_shift(truth[-1], aligned[-1])
    assert abs(last[0] - 1) < 0.03
    assert np.abs(aligned - truth).mean() < 0.015
