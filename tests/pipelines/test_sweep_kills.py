"""A sweep of twelve trials that is killed repeatedly, and trials over two nodes, one of which dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import sweep_bench
from sweep_bench import PLANTED, finish, result, start, write

from ex4d import config
from ex4d.train import runlog
from pipelines.runtime.cluster import require_token

pytestmark = [pytest.mark.heavy, pytest.mark.ray, pytest.mark.timeout(5400)]
SECTION = {"space": {"train.lr": {"log_uniform": [1e-5, 3e-2]}}, "num_trials": 12, "grace_steps": 3}
STORE = {"object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    return sweep_bench.make(tmp_path_factory.mktemp("sweep"))


def adapters(folder: Path) -> dict[Path, int]:
    """Return {file of a finished trial: when it was written}."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/train/adapter/*")}


def training(folder: Path) -> int | None:
    """Return the process id of a trial's training that has done a step but has not finished, or None."""
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
    """Wait until that many trials have started, and return the process id of a training in progress."""
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


@pytest.fixture
def cluster():
    """A head without processors for the command, and two nodes that hold one rank each."""
    require_token()
    os.environ.update(RAY_worker_niceness="0")  # default 15, with which they starve on a busy machine
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **STORE, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, **STORE)
        yield made
    finally:
        made.shutdown()


@pytest.mark.timeout(1200)
def test_a_trial_of_two_ranks_over_two_nodes_is_done_again_where_a_node_dies(bench, cluster):
    train = PLANTED | {"launcher": "ray", "num_processes": 2, "num_steps": 100, "micro_batch_size": 1}
    section = {"space": {"train.lr": {"choice": [1e-3]}}, "search": "grid", "scheduler": "none"}
    common = {**section, "grace_steps": 20, "repeat_seeds": 1}
    sweeping = start(write(bench, "nodes", train, {"address": cluster.address}, **common))
    try:
        while not any((bench / "nodes" / "trials").glob("*/train/checkpoints/step-000020")):
            assert sweeping.poll() is None, sweeping.communicate()[0]
            time.sleep(0.02)
        (lost,) = random.sample(sorted(cluster.worker_nodes, key=id), 1)
        cluster.remove_node(lost, allow_graceful=False)
        cluster.add_node(num_cpus=1, **STORE)
        code, text = finish(sweeping, 900)
    finally:
        sweeping.kill()
    assert code == 0, text
    (trial,) = result(bench, "nodes")["trials"]
    assert (trial["state"], trial["step"]) == ("finished", 100)
    folder = Path(trial["folder"])
    log = runlog.read(folder / "train" / "metrics.jsonl")
    assert [m["step"] for m in log] == list(range(1, 101))
    assert {m["processes"] for m in log} == {2}
    words = (folder / "train.log").read_text()
    assert words.count("Started training worker group of size 2") > 1, "it was done again"
    assert len(words.splitlines()) < 300, "Ray's helpers do not fill the log"
    # A batch of 2 in one process equals a batch of 1 in two, so the lost node does not change the result.
    code, text = finish(start(write(bench, "alone", PLANTED | {"num_steps": 100}, **common)))
    assert code == 0, text
    assert trial["value"] == pytest.approx(result(bench, "alone")["trials"][0]["value"], rel=1e-4)
