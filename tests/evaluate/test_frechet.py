"""The Fréchet distance against its slow twin, the textbook formula with a matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ex4d.evaluate.frechet import Gaussian, frechet_distance


def distance(a: np.ndarray, b: np.ndarray, parts: int = 1) -> float:
    """The distance between rows that are added in that many parts."""
    sets = []
    for rows in (a, b):
        one = Gaussian()
        for part in np.array_split(rows, parts):
            one.add(part)
        sets.append(one)
    return frechet_distance(*sets)


def slow(a: np.ndarray, b: np.ndarray) -> float:
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


@pytest.mark.parametrize("count", [12, 40, 400])
def test_it_is_the_textbooks_formula(count):
    rng = np.random.default_rng(count)
    a = rng.normal(size=(count, 8)) @ rng.normal(size=(8, 8))
    b = rng.normal(size=(count + 5, 8)) @ rng.normal(size=(8, 8)) + 1.5
    for parts in (1, 3, count):
        assert distance(a, b, parts) == pytest.approx(slow(a, b), rel=1e-9)


def test_moved_features_are_as_far_as_they_were_moved():
    a = np.random.default_rng(0).normal(size=(50, 6))
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distance(a, a + 2.0) == pytest.approx(24.0)
    assert distance(a, 3 * a) == pytest.approx(4 * (a.var(0, ddof=1).sum() + (a.mean(0) ** 2).sum()))


def test_fewer_samples_than_features_are_exact_too():
    """The rows span two of 300 dimensions, so that a rotation of the axes must not change the distance."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 2)), rng.normal(size=(7, 2)) * 2 + 1
    turn = np.linalg.qr(rng.normal(size=(300, 300)))[0][:2]
    assert distance(a @ turn, b @ turn, 2) == pytest.approx(slow(a, b), rel=1e-9)


def test_what_is_kept_does_not_grow():
    one, rng = Gaussian(), np.random.default_rng(2)
    rows = rng.normal(size=(500, 6)) + np.arange(6)
    for part in np.array_split(rows, 100):
        one.add(part)
        assert len(one.factor) <= 12 + 6
    np.testing.assert_allclose(one.mean, rows.mean(axis=0))
    np.testing.assert_allclose(one.factor.T @ one.factor / 499, np.cov(rows.T), atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [((1, 4), (9, 4)), ((5, 4), (5, 3))])
def test_sets_that_have_no_distance_are_refused(a, b):
    with pytest.raises(ValueError, match="two rows of equal width"):
        distance(np.zeros(a), np.zeros(b))
