"""The small corpus and its settings; modules that need others define their own. And which files a run reads."""

from __future__ import annotations

import os

import pytest
from small_corpus import CORPUS, choices

from ex4d import storage
from ex4d.depth import places
from ex4d.synthetic import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, CORPUS)
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    return choices(corpus, tmp_path / "out")


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are hashed, in order."""
    found = []

    def noting(real):
        def sha256(path, *more, **named):
            found.append(os.path.basename(path))
            return real(path, *more, **named)

        return sha256

    monkeypatch.setattr(storage, "sha256", noting(storage.sha256))
    monkeypatch.setattr(places, "sha256", noting(places.sha256))
    return found
