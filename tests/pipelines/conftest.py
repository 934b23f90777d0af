"""The small corpus and its settings; modules that need others define their own."""

from __future__ import annotations

import pytest
from small_corpus import CORPUS, choices

from ex4d.synthetic import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, CORPUS)
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    return choices(corpus, tmp_path / "out")
