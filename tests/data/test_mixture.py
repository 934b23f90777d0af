"""Mixing datasets: shares by weight, the same order at every start, no batch from two datasets."""

from __future__ import annotations

from itertools import islice

import pytest

from ex4d.data.mixture import turns


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 999.0)])
def test_every_prefix_has_the_shares_within_one_step(weights: tuple[float, ...]) -> None:
    taken = [0] * len(weights)
    for step, chosen in enumerate(islice(turns(weights), 2000), start=1):
        taken[chosen] += 1
        for done, weight in zip(taken, weights, strict=True):
            assert abs(done - step * weight / sum(weights)) <= 1


def test_three_to_one() -> None:
    assert list(islice(turns((3.0, 1.0)), 8)) == [0, 0, 1, 0, 0, 0, 1, 0]
