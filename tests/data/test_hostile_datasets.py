"""`verify` is what one runs first on a stranger's dataset: it survives whatever lies there and names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("hostile.py")
GROWTH_MB = 400  # by reading any one dataset, in our own process


def result(dataset: Path, work: Path, which: str, timeout_s: float) -> dict:
    """Run hostile.py within 6 GiB of address space: what it prints."""
    command = ["bash", "-c", 'ulimit -v 6291456; exec "$@"', "-", sys.executable, str(PROGRAM)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(dataset), str(work), which], env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_bomb_is_named_and_takes_little_memory(dataset16, tmp_path):
    found = result(dataset16, tmp_path, "bombs", 300)["found"]
    assert {name for name, what in found.items() if what["ok"] or not what["problems"]} == set()
    assert {name: what["grew_mb"] for name, what in found.items() if what["grew_mb"] > GROWTH_MB} == {}
    assert {name: what["seconds"] for name, what in found.items() if what["seconds"] > 60} == {}
    assert "a page" not in {what["view"] for name, what in found.items() if name.startswith("dataset.json")}


@pytest.mark.heavy
def test_a_clip_of_far_more_frames_than_stated_stops_early(dataset16, tmp_path):
    (what,) = result(dataset16, tmp_path, "slow", 600)["found"].values()
    assert not what["ok"]
    assert what["grew_mb"] < GROWTH_MB


def check_fuzzed(dataset: Path, work: Path, which: str, timeout_s: float) -> None:
    made = result(dataset, work, which, timeout_s)
    quiet = {name for name, what in made["found"].items() if what["ok"]}
    # A table may be sealed again after a change of what no table can prove, such as a message of a reject.
    assert len(quiet) <= 0.2 * len(made["found"]), quiet
    assert {name: what["grew_mb"] for name, what in made["found"].items() if what["grew_mb"] > GROWTH_MB} == {}
    assert {name: what["seconds"] for name, what in made["found"].items() if what["seconds"] > 60} == {}


def test_forty_fuzzed_datasets_are_refused_or_named(dataset16, tmp_path):
    check_fuzzed(dataset16, tmp_path, "0:40", 300)


@pytest.mark.heavy
def test_five_hundred_fuzzed_datasets_are_refused_or_named(dataset16, tmp_path):
    check_fuzzed(dataset16, tmp_path, "0:500", 3000)
