"""A sweep of twelve trials that is killed again and again, and trials over two nodes of which one dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sweep_bench
from sweep_bench import PLANTED, finish, result, start, write

from ex4d import config
from ex4d.train import runlog

pytestmark = [pytest.mark.heavy, pytest.mark.ray, pytest.mark.timeout(5400)]
SECTION = {"space": {"train.lr": {"log_uniform": [1e-5, 3e-2]}}, "num_trials": 12, "grace_steps": 3}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    return sweep_bench.make(tmp_path_factory.mktemp("sweep"))


def adapters(folder: Path) -> dict[Path, int]:
    """Return {file of a finished trial: when it was written}."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/train/adapter/*")}


def training(folder: Path) -> int | None:
    """Return the process id of a trial's training that has done a step and is not through, or None."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        config_file = next((Path(w.decode()) for w in words if w.startswith(os.fsencode(folder / "trials"))), None)
        if config_file and (config_file.parent / "train" / "metrics.jsonl").exists():
            return int(path.parent.name)
    return None


def wait_for_training(folder: Path, begun: int, process: subprocess.Popen) -> int:
    """Return the process id of a training that is midway, once so many trials have begun."""
    deadline = time.monotonic() + 1200
    while len(list(folder.glob("trials/*"))) < begun or (found := training(folder)) is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_twelve_trials_beat_the_default_or_say_that_they_do_not_and_survive_kills(bench):
    began = time.monotonic()
    code, text = finish(start(write(bench, "whole", PLANTED, **SECTION)), 3000)
    print(f"undisturbed: {time.monotonic() - began:.0f} s\n{text}")
    assert code == 0, text
    whole = result(bench, "whole")
    assert len(whole["trials"]) == 12
    values = {name: [row["value"] for row in rows] for name, rows in whole["repeats"].items()}
    assert {name: len(found) for name, found in values.items()} == {"best": 3, "default": 3}
    spread = max(max(found) - min(found) for found in values.values())
    gain = (sum(values["default"]) - sum(values["best"])) / 3
    assert whole["verdict"].startswith("Better than" if gain > spread else "Not better than")

    path, folder = write(bench, "killed", PLANTED, **SECTION, repeat_seeds=1), bench / "killed"
    kept: dict[Path, int] = {}
    for begun in (3, 7):
        process = start(path)
        os.kill(wait_for_training(folder, begun, process), signal.SIGKILL)  # the trial's own process, not Ray's
        wait_for_training(folder, begun + 2, process)
        kept |= adapters(folder)
        process.kill()
        process.communicate()
        time.sleep(2)
    code, text = finish(start(path), 3000)
    assert code == 0, text
    now = adapters(folder)
    assert {p: now.get(p) for p in kept} == kept, "finished trials are not repeated"

    def shown(name: str) -> list[tuple]:
        trials = result(bench, name)["trials"]
        return sorted((t["point"]["train.lr"], t["step"], t["state"], t["value"]) for t in trials)

    assert shown("killed") == shown("whole")
    rates = [config.read_yaml(bench / name / "best.yaml")["train"]["lr"] for name in ("killed", "whole")]
    assert rates[0] == rates[1]


# In a process of its own: one process can be in one cluster only.
TWO_NODES = """
import subprocess, sys, threading, time
from pathlib import Path
from pipelines.runtime.cluster import require_token
require_token()
from ray.cluster_utils import Cluster
from pipelines.train import sweep

path, trials = sys.argv[1], Path(sys.argv[2])
node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
cluster.wait_for_nodes()

def lose():
    while not any(trials.glob("*/train/checkpoints/step-000003")):
        time.sleep(0.05)
    cluster.remove_node(other, allow_graceful=False)
    print("a node is lost", flush=True)
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

threading.Thread(target=lose, daemon=True).start()
code = sweep.command(path, [f"ray.address={cluster.address}"])
cluster.shutdown()
sys.exit(code)
"""


@pytest.mark.timeout(1800)
def test_a_trial_of_two_ranks_over_two_nodes_is_done_again_where_a_node_dies(bench):
    train = PLANTED | {"launcher": "ray", "num_processes": 2, "num_steps": 6, "micro_batch_size": 1}
    section = {"space": {"train.lr": {"choice": [1e-3]}}, "search": "grid", "scheduler": "none"}
    path = write(bench, "nodes", train, **section, grace_steps=3, repeat_seeds=1)
    command = [sys.executable, "-c", TWO_NODES, str(path), str(bench / "nodes" / "trials")]
    folder = tempfile.mkdtemp(prefix="ex4d-")
    environment = os.environ | sweep_bench.ENVIRONMENT | {"RAY_TMPDIR": folder}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "a node is lost" in done.stdout
    trials = result(bench, "nodes")["trials"]
    assert [(trial["state"], trial["step"]) for trial in trials] == [("finished", 6)]
    log = runlog.read(Path(trials[0]["folder"]) / "train" / "metrics.jsonl")
    assert [m["step"] for m in log] == list(range(1, 7))
    assert {m["processes"] for m in log} == {2}
    # A batch of 2 in one process is a batch of 1 in two: what the lost node cost is not in the result.
    alone = write(bench, "alone", PLANTED | {"num_steps": 6}, **section, grace_steps=3, repeat_seeds=1)
    code, text = finish(start(alone))
    assert code == 0, text
    assert trials[0]["value"] == pytest.approx(result(bench, "alone")["trials"][0]["value"], rel=1e-4)
