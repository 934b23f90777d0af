"""Missing weights: a message that says what to download, in a process that has imported nothing else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from ex4d import hub
from ex4d.errors import ConfigError

ALONE = """
from ex4d import hub
from ex4d.errors import ConfigError
try:
    hub.resolve("nobody/has-this@abc", ["*.json"], "preprocess.depth_path")
except ConfigError as error:
    print(error)
"""


def test_missing_weights_are_named_by_a_process_of_its_own(root, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "preprocess.depth_path='nobody/has-this@abc'" in done.stdout
    assert "hf download nobody/has-this --revision abc" in done.stdout


def test_a_folder_is_taken_as_it_is_and_what_is_neither_is_a_choice_to_correct(tmp_path):
    assert hub.resolve(str(tmp_path), ["*.json"], "key") == tmp_path
    with pytest.raises(ConfigError, match=r"key='/no/such/folder/at/all'"):
        hub.resolve("/no/such/folder/at/all", ["*.json"], "key")


@pytest.mark.parametrize(
    "given",
    [
        *("a/b; touch x", "a/$(id)", "../b", "a/..", "-x/b", "a/b/c", "a/b\nc"),
        *("a/b@main; id", "a/b@--x", "a/b@../c", "a/b@c@d", "a/b@\u202ec"),
    ],
)
def test_ids_and_revisions_that_no_hub_has_are_refused_before_anything_is_asked(given, monkeypatch):
    monkeypatch.setattr(hub, "_snapshot", lambda *asked: pytest.fail(f"asked for {asked}"))
    with pytest.raises(ConfigError, match="neither an existing folder nor hub-id"):
        hub.resolve(given, ["*.json"], "model.base")


@pytest.mark.parametrize("given", ["gpt2", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers@0fad780", "a/b@refs/pr/1", "a/b@v1.0"])
def test_ids_and_revisions_of_hubs_are_asked_for(given, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_snapshot", lambda *asked: str(tmp_path))
    assert hub.resolve(given, ["*.json"], "model.base") == tmp_path


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "depth.npz"
    path.write_bytes(b"one")
    read = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(name) or real(file, name))
    assert hub.file_sha256(path) == hub.file_sha256(str(path)) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 2  # it was changed a moment ago, and may be again without another time
    read.clear()
    monkeypatch.setattr(hub, "SETTLED_S", -1.0)
    assert hub.file_sha256(path) == hub.file_sha256(str(path)) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    path.write_bytes(b"two!")
    assert hub.file_sha256(path) == hashlib.sha256(b"two!").hexdigest()
