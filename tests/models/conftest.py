"""Fixtures for the tests of the models: one tiny base of the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny I2V base in diffusers layout."""
    from wan_checkpoint import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("wan"))
