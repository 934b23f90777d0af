"""Datasets that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_data import REJECTS, facts, stage

from ex4d.data.shards import Staged, pack


@pytest.fixture(scope="session")
def staged16(tmp_path_factory) -> list[Staged]:
    """Sixteen staged samples; read only."""
    return stage(tmp_path_factory.mktemp("staging"), 16)


@pytest.fixture(scope="session")
def dataset16(staged16, tmp_path_factory) -> Path:
    """A packed dataset of sixteen samples in several shards; read only."""
    folder = tmp_path_factory.mktemp("dataset")
    pack(staged16, str(folder), facts(16), REJECTS, shard_size_bytes=100_000)
    return folder
