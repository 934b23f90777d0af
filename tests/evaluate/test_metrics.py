"""Metrics against values worked out by hand and against slow twins."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.evaluate import metrics


def test_psnr_of_a_known_error():
    truth = np.full((2, 4, 4, 3), 100, np.uint8)
    assert metrics.psnr(truth + 5, truth) == pytest.approx(10 * np.log10(255**2 / 25))
    assert metrics.psnr(truth, truth) == metrics.PSNR_CAP_DB


def test_psnr_counts_the_mask_only_and_says_when_it_is_empty():
    truth = np.zeros((1, 4, 4, 3), np.uint8)
    wrong = truth.copy()
    wrong[0, 0, 0] = 255
    mask = np.zeros((1, 4, 4), bool)
    assert np.isnan(metrics.psnr(wrong, truth, mask))
    mask[0, 0, 0] = True
    assert metrics.psnr(wrong, truth, mask) == pytest.approx(0.0)
    mask[0, 0, 1] = True
    assert metrics.psnr(wrong, truth, mask) == pytest.approx(10 * np.log10(2))


def test_psnr_refuses_other_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.psnr(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 5, 3), np.uint8))


def _slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The same formula with the window moved by hand over every inner pixel."""
    x = np.arange(11) - 5
    line = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for channel in range(3):
        for i in range(5, a.shape[0] - 5):
            for j in range(5, a.shape[1] - 5):
                p = a[i - 5 : i + 6, j - 5 : j + 6, channel].astype(float)
                q = b[i - 5 : i + 6, j - 5 : j + 6, channel].astype(float)
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
                cov = (window * p * q).sum() - mp * mq
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_equals_its_slow_twin():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (18, 20, 3), np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-40, 40, a.shape), 0, 255).astype(np.uint8)
    assert metrics.ssim(a, b) == pytest.approx(_slow_ssim(a, b), abs=1e-9)
    assert metrics.ssim(a, a) == pytest.approx(1.0)


def test_inpainting_fills_holes_and_leaves_the_rest():
    frames = np.full((1, 16, 16, 3), 90, np.uint8)
    visible = np.ones((1, 16, 16), bool)
    visible[0, 6:9, 6:9] = False
    filled = metrics.inpaint(frames * visible[..., None], visible)
    assert (filled[visible] == 90).all()
    assert abs(filled[~visible].astype(int) - 90).max() <= 2
