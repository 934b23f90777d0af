"""Fixtures that several test files share: the folder of real media, and quiet libraries with few threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One thread each: the suite runs on two cores, and bytes and losses must not depend on a pool's size.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def media() -> Path:
    """A folder of real videos, depth and camera files; the test is skipped if there is none."""
    folder = Path(os.environ.get("EX4D_MEDIA", ROOT.parent / "shared" / "media"))
    if not folder.is_dir():
        pytest.skip("real media are not here: set EX4D_MEDIA to a folder of them")
    return folder


@pytest.fixture(scope="session")
def ray_local():
    """One local Ray for the whole session."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=300 * 2**20,
        )
    yield ray
    ray.shutdown()
