"""`kill -9` in every phase of the driver: reading videos, planning units, writing records and shards, dropping tars."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_corpus import choices

from ex4d.config import to_dict
from ex4d.data.verify import verify

PHASES = {
    "video": "pipelines.preprocess.tables:Tables.add_video",
    "unit": "pipelines.preprocess.units:Unit.plan",
    "part": "pipelines.runtime.records:Records.add",
    "shard": "ex4d.data.building:place",
    "drop": "pipelines.runtime.packed:delete",
    "restore": "pipelines.runtime.packed:restore",
}
# The process kills itself before or after call NUMBER of a function; with 0 it counts the calls.
MAIN = """
import functools, importlib, json, os, signal, sys
from ex4d import config
from ex4d.data import shards
from pipelines.preprocess import run as preprocess, tables
target, number, after, settings = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "after", json.loads(sys.argv[4])
tables.UNIT_VIDEOS = 1
whole = shards.pack_contents
shards.pack_contents = lambda contents, output, facts, size, **more: whole(contents, output, facts, 25_000, **more)
module, _, name = target.partition(":")
owner = functools.reduce(getattr, name.split(".")[:-1], importlib.import_module(module))
function, calls = getattr(owner, name.split(".")[-1]), []
def counted(*args, **more):
    calls.append(1)
    if len(calls) == number and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    done = function(*args, **more)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
setattr(owner, name.split(".")[-1], counted)
result = preprocess.run(config.validate(preprocess.PreprocessConfig, settings, "preprocess"), runner_name="inline")
print(len(calls))
sys.exit(result.exit_code)
"""


def run(config, target, number=0, when="before"):
    command = [sys.executable, "-c", MAIN, target, str(number), when, json.dumps(to_dict(config))]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, env=os.environ)


def tree(config):
    report = verify(config.output, full=True)
    assert report.problems == ()
    return report.tree_sha256


@pytest.fixture(scope="module")
def begun(corpus, tmp_path_factory):
    """{phase: (settings, folder that a run starts with, hash that it must end with, calls of the phase)}."""
    folder, found = tmp_path_factory.mktemp("begun"), {}
    for phase, target in PHASES.items():
        keep = "none" if phase in ("drop", "restore") else "all"
        # All samples are in the other split first, so that all shards are rebuilt.
        config = choices(corpus, folder / phase, val_fraction=0.0, keep_staging=keep)
        if phase in ("unit", "shard", "restore"):
            assert run(replace(config, val_fraction=1.0), target).returncode == 0
        start = folder / f"{phase}-start"
        shutil.copytree(folder / phase, start) if (folder / phase).exists() else start.mkdir()
        done = run(config, target)
        assert done.returncode == 0
        found[phase] = (config, start, tree(config), int(done.stdout.split()[-1]))
    assert len({whole for _, _, whole, _ in found.values()}) == 1
    assert all(calls >= 4 for *_, calls in found.values())
    return found


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_any_call_of_a_phase_a_run_is_made_up(begun, phase, number):
    config, start, whole, calls = begun[phase]
    rng = np.random.default_rng([list(PHASES).index(phase), number])
    shutil.rmtree(config.output)
    shutil.copytree(start, config.output)
    killed = run(config, PHASES[phase], int(rng.integers(1, calls + 1)), ("before", "after")[number % 2])
    assert killed.returncode == -9
    resumed = run(config, PHASES[phase])
    assert resumed.returncode == 0
    assert tree(config) == whole
    staging = Path(config.output, "staging")
    assert list(staging.rglob(".tmp-*")) == []
    assert bool(list(staging.glob("clips/*.tar"))) == (config.keep_staging == "all")
