"""Compiled functions survive a full disk, and near duplicates do not depend on a stale cache."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from ex4d.compiled import kernel
from pipelines.preprocess import duplicates, identity
from pipelines.runtime.scratch import scratch


def test_a_function_runs_where_its_cache_cannot_be_written(monkeypatch):
    tried = []

    def save(self, *args):
        tried.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", save)

    @kernel
    def add(one, other):
        return one + other

    assert add(np.int64(1), np.int64(2)) == 3
    assert tried


@pytest.mark.parametrize(("max_bits", "are_near"), [(10, True), (3, False)])
def test_a_changed_threshold_changes_what_is_near(max_bits, are_near, monkeypatch):
    """Numba would not compile again if the threshold were a constant of another module."""
    from pipelines.preprocess import near

    for module in (duplicates, near):
        monkeypatch.setattr(module, "MAX_BITS", max_bits)
    look = np.random.default_rng(2).integers(0, 2**63, 8)
    looks = [[f"{value ^ change:016x}" for value in look] for change in (0, 0b11111)]
    table, collector = identity.Identity(scratch()), identity.Collector()
    for number, hashes in enumerate(looks, 1):
        collector.add(f"{number:064x}", hashes, (8, 8), 1.0)
    table.extend("", collector.columns())
    assert bool(list(table.decide("group"))) == are_near == duplicates.are_near(*looks)
