"""Small whole sweeps with Ray Tune and real trainings: the winner, population-based training, Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import sweep_bench
from sweep_bench import PLANTED, finish, result, start, write

from ex4d import config
from ex4d.models import weights
from ex4d.train import runlog

pytestmark = [pytest.mark.heavy, pytest.mark.ray, pytest.mark.timeout(1800)]
SPACE = {"train.lr": {"choice": [1e-5, 1e-3, 3e-3]}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    return sweep_bench.make(tmp_path_factory.mktemp("sweep"))


def check_winner(bench: Path, name: str, key: str, num_trials: int) -> list[dict]:
    """Assert that best.yaml holds the best of the trials with the most steps; return the trials."""
    trials = result(bench, name)["trials"]
    assert len(trials) == num_trials
    assert max(trial["step"] for trial in trials) == 9
    best = min((t for t in trials if t["step"] == 9), key=lambda t: t["value"])
    section, leaf = key.split(".")
    assert config.read_yaml(bench / name / "best.yaml")[section][leaf] == best["point"][key]
    assert {t["state"] for t in trials} <= {"finished", "stopped"}
    assert all((t["state"] == "finished") == (t["step"] == 9) for t in trials)
    return trials


@pytest.mark.parametrize("metric", ["loss", "validation_loss"])
def test_best_yaml_holds_what_was_trained_furthest_and_is_best_there(bench, metric):
    name = f"planted-{metric}"
    section = {"space": SPACE, "search": "grid", "metric": metric, "window": 1, "grace_steps": 6, "repeat_seeds": 1}
    code, text = finish(start(write(bench, name, PLANTED, **section)))
    assert code == 0, text
    trials = check_winner(bench, name, "train.lr", 3)
    assert {step for trial in trials for step, _ in trial["curve"]} == {6, 9}
    for trial in trials:
        if trial["state"] == "finished":  # Ray ends a trial at its last report: its adapter must be there
            assert (Path(trial["folder"]) / "train" / "adapter" / "adapter.safetensors").exists()


def test_a_ranking_that_is_wrong_at_the_first_comparison_does_not_decide(bench):
    """With a learning rate of 1e-12 the error of a step depends on the seed's clips and noise alone: it is no trend."""
    space = {"train.seed": {"choice": [4, 5, 6, 7]}}
    section = {"space": space, "search": "grid", "metric": "mse", "window": 1, "grace_steps": 3, "repeat_seeds": 1}
    train = PLANTED | {"lr": 1e-12}
    code, text = finish(start(write(bench, "twin", train, scheduler="none", **section)))
    assert code == 0, text
    trials = check_winner(bench, "twin", "train.seed", 4)
    values = {t["point"]["train.seed"]: dict(t["curve"]) for t in trials}
    assert all(sorted(curve) == [3, 6, 9] for curve in values.values())
    leader = min(values, key=lambda seed: values[seed][3])
    assert leader != trials[0]["point"]["train.seed"], f"the case is not as planned: {values}"
    lowest = min(min(curve.values()) for curve in values.values())
    assert lowest < trials[0]["value"], f"no earlier value was lower: {values}"


def test_a_weight_that_only_scales_the_loss_does_not_move_the_objective(bench):
    train = PLANTED | {"lr": 1e-12, "num_steps": 3}
    section = {"space": {"train.hole_weight": {"choice": [1.0, 2.0, 4.0]}}, "search": "grid", "grace_steps": 3}
    code, text = finish(start(write(bench, "weight", train, scheduler="none", repeat_seeds=1, **section)))
    assert code == 0, text
    values = [trial["value"] for trial in result(bench, "weight")["trials"]]
    assert len(values) == 3
    assert max(values) - min(values) <= 1e-6


def test_a_sweep_that_ended_gets_more_trials_and_more_at_a_time(bench):
    section = {"space": {"train.lr": {"log_uniform": [1e-5, 3e-2]}}, "scheduler": "none", "repeat_seeds": 1}
    path = write(bench, "more", PLANTED, num_trials=2, cpus_per_trial=0.5, **section)
    assert finish(start(path))[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (bench / "more").glob("trials/*/train/adapter/*")}
    code, text = finish(start(path, "sweep.num_trials=5", "sweep.max_concurrent=3"))
    assert code == 0, text
    assert {p: p.stat().st_mtime_ns for p in before} == before, "finished trials are not repeated"
    assert re.search(r"trial 5 \S+ running(.|\n)*trial 3 \S+ finished", text), f"not three at a time:\n{text}"
    whole = write(bench, "whole", PLANTED, num_trials=5, max_concurrent=3, cpus_per_trial=0.5, **section)
    assert finish(start(whole))[0] == 0
    points = [sorted(t["point"]["train.lr"] for t in result(bench, name)["trials"]) for name in ("more", "whole")]
    assert points[0] == points[1]
    code, text = finish(start(path, "sweep.num_trials=4"))
    assert code == 2, text
    assert "has 5; use that value" in text


def test_a_trial_that_waits_for_more_cpus_than_there_are_starts_when_resumed_with_fewer(bench):
    section = {"space": SPACE, "search": "grid", "repeat_seeds": 1}
    path = write(bench, "waiting", PLANTED, cpus_per_trial=99, **section)
    process = start(path)
    text = ""
    while "1 waiting" not in text:
        text += (line := process.stdout.readline())
        assert line, text
    time.sleep(3)  # until Ray Tune has written its state
    process.send_signal(signal.SIGINT)
    assert finish(process, 300)[0] == 130
    code, text = finish(start(path, "sweep.cpus_per_trial=1"), 300)
    assert code == 0, text
    assert {trial["state"] for trial in result(bench, "waiting")["trials"]} <= {"finished", "stopped"}


@pytest.mark.parametrize("expert", ["high", "low"])
def test_either_expert_of_two_is_swept(tmp_path, expert):
    bench = sweep_bench.make(tmp_path)
    shutil.copytree(bench / "base" / "transformer", bench / "base" / "transformer_2")
    (bench / "base" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    train = PLANTED | {"num_steps": 3, "expert": expert}
    section = {"space": {"train.lr": {"choice": [1e-5, 1e-3]}}, "search": "grid", "grace_steps": 3, "repeat_seeds": 1}
    code, text = finish(start(write(bench, "expert", train, scheduler="none", **section)))
    assert code == 0, text
    trials = result(bench, "expert")["trials"]
    assert [trial["step"] for trial in trials] == [3, 3]
    for trial in trials:
        assert weights.read_metadata(Path(trial["folder"]) / "train" / "adapter").expert == expert
    assert config.read_yaml(bench / "expert" / "best.yaml")["train"]["expert"] == expert


def test_ctrl_c_says_what_is_kept_and_ends_with_130(bench):
    path = write(bench, "interrupted", PLANTED | {"num_steps": 3000}, space=SPACE, search="grid", grace_steps=1000)
    process = start(path)
    while not list((bench / "interrupted").glob("trials/*/train/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.2)
    code, text = finish(start(path))
    assert code == 2, text
    assert "another run is writing there" in text
    process.send_signal(signal.SIGINT)
    code, text = finish(process, 300)
    assert code == 130, text
    last = text.strip().splitlines()[-1]
    assert last.startswith("interrupted: 0 ended trials and the checkpoints of the others are kept in"), text
    assert "best configuration" not in text
    assert "Traceback" not in text
    assert {trial["state"] for trial in result(bench, "interrupted")["trials"]} == {"interrupted"}


def test_pbt_goes_on_from_the_winners_exact_state(bench):
    """The first step after a takeover has the winner's own loss: it is computed before the new learning rate acts."""
    space = {"train.lr": {"log_uniform": [1e-6, 3e-2]}}
    section = {"space": space, "search": "pbt", "num_trials": 4, "grace_steps": 3, "max_concurrent": 4}
    code, text = finish(start(write(bench, "pbt", PLANTED, cpus_per_trial=0.25, **section)))
    assert code == 0, text
    trials = result(bench, "pbt")["trials"]
    assert [(trial["state"], trial["step"]) for trial in trials] == [("finished", 9)] * 4
    logs = {p.parent.parent.name: runlog.read(p) for p in (bench / "pbt").glob("trials/*/train/metrics.jsonl")}
    assert len(logs) == 4
    taken = 0
    for name, log in logs.items():
        assert [m["step"] for m in log] == list(range(log[0]["step"], 10))
        for before, after in zip([None, *log], log, strict=False):
            if after["step"] > 1 and (before is None or before["lr"] != after["lr"]):
                others = [m["loss"] for key, own in logs.items() if key != name for m in own]
                assert after["loss"] in others, (name, after["step"])
                taken += 1
    assert taken >= 1, "one took over another's state"
