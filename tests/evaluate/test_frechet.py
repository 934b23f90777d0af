"""The Fréchet distance against its slow twin, the textbook's formula with a matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ex4d.evaluate.frechet import frechet_distance


def slow(a: np.ndarray, b: np.ndarray) -> float:
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


@pytest.mark.parametrize("count", [12, 40, 400])
def test_it_is_the_textbooks_formula(count):
    rng = np.random.default_rng(count)
    a = rng.normal(size=(count, 8)) @ rng.normal(size=(8, 8))
    b = rng.normal(size=(count + 5, 8)) @ rng.normal(size=(8, 8)) + 1.5
    assert frechet_distance(a, b) == pytest.approx(slow(a, b), rel=1e-9)


def test_moved_features_are_as_far_as_they_were_moved():
    a = np.random.default_rng(0).normal(size=(50, 6))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(24.0)
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * (a.var(0, ddof=1).sum() + (a.mean(0) ** 2).sum()))


def test_fewer_samples_than_features_are_exact_too():
    """In a plane of two dimensions out of 300: a rotation of the axes changes nothing."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 2)), rng.normal(size=(7, 2)) * 2 + 1
    turn = np.linalg.qr(rng.normal(size=(300, 300)))[0][:2]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(slow(a, b), rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [((1, 4), (9, 4)), ((5, 4), (5, 3)), ((5,), (5,))])
def test_sets_that_have_no_distance_are_refused(a, b):
    with pytest.raises(ValueError, match="N, M >= 2"):
        frechet_distance(np.zeros(a), np.zeros(b))
