"""The sweep's own parts, and whole small sweeps with Ray Tune, real trainings and kills."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ex4d import config
from ex4d.errors import ConfigError, ContractError
from pipelines.train import sweep, sweep_report, sweep_trial
from pipelines.train.sweep_space import Space, with_values

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "train"))


def test_values_are_put_into_a_copy():
    tree = {"train": {"lr": 1.0, "betas": [0.9, 0.99]}}
    changed = with_values(tree, {"train.lr": 2.0, "model.lora_rank": 4})
    assert changed == {"train": {"lr": 2.0, "betas": [0.9, 0.99]}, "model": {"lora_rank": 4}}
    assert tree == {"train": {"lr": 1.0, "betas": [0.9, 0.99]}}
    assert with_values({"train": None}, {"train.lr": 1.0}) == {"train": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"sweep.lr": {"uniform": [0, 1]}}, "train. or model."),
        ({"train.lr": {"gauss": [0, 1]}}, "log_uniform"),
        ({"train.lr": {"uniform": [1]}}, "low, high"),
        ({"train.lr": {"choice": []}}, "values"),
        ({"train.lr": {"log_uniform": [-1, 1]}}, r"sweep\.space\.train\.lr"),
        ({"train.lr": {"uniform": ["a", "b"]}}, r"sweep\.space\.train\.lr"),
        ({"train.lr": {"uniform": [0.1, 1], "choice": [1]}}, "one of"),
        ({"train.learning_rate": {"uniform": [0.1, 1]}}, "a setting of the section train"),
        ({"train.lr": {"choice": [1e-3, -1.0]}}, r"train\.lr"),
        ({"model.lora_rank": {"choice": ["many"]}}, r"model\.lora_rank"),
        ({"train.num_steps": {"choice": [1, 2]}}, "the sweep's own"),
        ({"train.lr": {"uniform": [0.1, 1], "when": {"train.lr_decay": ["none"]}}}, "stand before it"),
        ({"model.lora_alpha": "=lora_rank"}, "at least one"),
    ],
)
def test_a_space_that_is_not_understood_is_named(space, named):
    with pytest.raises(ConfigError, match=named):
        Space.of(space)


def test_conditions_steps_and_settings_that_follow_others():
    space = Space.of(
        {
            "train.lr_decay": {"choice": ["none", "cosine"]},
            "train.warmup_steps": {"int_uniform": [0, 20, 10], "when": {"train.lr_decay": ["cosine"]}},
            "model.lora_rank": {"choice": [4, 8]},
            "model.lora_alpha": "=lora_rank",
        }
    )
    points = space.grid()
    assert len(points) == 2 * (1 + 3)
    assert {point.get("train.warmup_steps") for point in points} == {None, 0, 10, 20}
    whole = space.whole({"train.lr_decay": "none", "train.warmup_steps": 10, "model.lora_rank": 8}, {})
    assert whole == {"train.lr_decay": "none", "model.lora_rank": 8, "model.lora_alpha": 8}


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"metric": "accuracy"}, "sweep.metric"),
        ({"metric": "loss", "space": {"train.hole_weight": {"uniform": [1, 4]}}}, "changes what `loss` means"),
        ({"report": ["speed"]}, "sweep.report"),
        ({"search": "grid"}, "takes every value"),
        ({"search": "pbt", "space": {"model.lora_rank": {"choice": [4, 8]}}}, "changes them midway"),
    ],
)
def test_choices_that_no_trial_could_follow_are_refused(section, named):
    with pytest.raises(ConfigError, match=named):
        config.validate(sweep.SweepConfig, section, "sweep")


def test_a_growing_file_is_followed_to_its_end_line_by_line(tmp_path):
    """A writer flushes half a line, waits, and completes it: no line is read twice, none is cut."""
    path = tmp_path / "metrics.jsonl"
    writer = (
        "import sys, time\n"
        "f = open(sys.argv[1], 'w')\n"
        "for i in range(5):\n"
        "    f.write('{\"step\": '); f.flush(); time.sleep(0.15)\n"
        "    f.write(f'{i}}}\\n'); f.flush()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)])
    steps = [record["step"] for record in sweep_trial.follow(path, process, poll_s=0.05)]
    assert steps == [0, 1, 2, 3, 4]
    assert process.returncode == 0


def row(lr, value, step, error=None):
    return {
        "drawn": {"train.lr": lr},
        "value": value,
        "step": step,
        "error": error,
        "curve": [[step, value]] if value is not None else [],
        "metrics": {},
        "folder": None,
    }


def test_the_furthest_trial_wins_then_the_lowest_value_and_failed_ones_come_last(tmp_path, capsys):
    settings = sweep.SweepConfig(output=str(tmp_path), space={"train.lr": {"uniform": [0.1, 1.0]}})
    tree = {"train": {"num_steps": 9}, "model": {}}
    rows = [row(0.1, 3.0, 9), row(0.2, 2.0, 9), row(0.3, 0.5, 3), row(0.4, 0.1, 9, "lost"), row(0.5, math.nan, 9)]
    found = sweep_report.ranked(rows, settings, tree)
    assert [r["point"]["train.lr"] for r in found[:3]] == [0.2, 0.1, 0.3]
    assert [r["state"] for r in found] == ["finished", "finished", "stopped", "failed", "failed"]
    assert sweep_report.write(found, {}, tree, settings) == 0
    best = config.read_yaml(tmp_path / "best.yaml")
    assert best["train"] == {"num_steps": 9, "lr": 0.2, "output": str(tmp_path / "best"), "seed": 0}
    assert (tmp_path / "best.yaml").read_text().startswith("# Lowest validation_loss (2) of the 2 of 5 trials")
    assert "best.yaml" in capsys.readouterr().out
    assert b"<svg" in (tmp_path / "report" / "index.html").read_bytes()


def test_a_sweep_whose_trials_all_failed_ends_with_1(tmp_path):
    settings = sweep.SweepConfig(output=str(tmp_path))
    tree = {"train": {"num_steps": 9}, "model": {}}
    found = sweep_report.ranked([row(1.0, None, None, "no")], settings, tree)
    assert sweep_report.write(found, {}, tree, settings) == 1
    assert not (tmp_path / "best.yaml").exists()


def test_the_page_escapes_what_it_shows(tmp_path):
    from ex4d.viewer.sweep_page import sweep_page

    rows = [
        {
            "point": {"train.prompt": "<script>alert(1)</script>"},
            "state": "finished",
            "value": 1.0,
            "step": 3,
            "curve": [[3, 1.0]],
        },
        {"point": {"train.prompt": "b"}, "state": "stopped", "value": 2.0, "step": 1, "curve": [[1, 2.0]]},
    ]
    page = sweep_page("mse", ["train.prompt"], rows, {"train.prompt": 1.0}, {"best": [1.0]}, "<b>verdict")
    assert b"<script>alert" not in page
    assert b"<b>verdict" not in page


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("train.zero_stage=7", ConfigError),
        ("train.no_such_key=1", ConfigError),
        ("preprocess.output=x", ConfigError),
        ("sweep.space={train.lr: {gauss: [0, 1]}}", ConfigError),
        ("sweep.num_trials=0", ConfigError),
        ("train.num_steps=3", ContractError),  # no dataset is there
    ],
)
def test_what_every_trial_would_trip_over_is_said_before_the_first(tmp_path, monkeypatch, override, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.yaml").write_text("train:\nsweep: {num_trials: 1}\n")
    monkeypatch.setattr(sweep, "run", lambda *_: pytest.fail("a trial was started"))
    with pytest.raises(error):
        sweep.command("some.yaml", [override])


# ---------------------------------------------------------------- whole sweeps


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    import make_run

    folder = tmp_path_factory.mktemp("sweep")
    make_run.make_dataset(folder)
    make_run.make_base(folder)
    return folder


def write(bench: Path, name: str, train: dict, **section) -> Path:
    model = {"base": str(bench / "base"), "lora_rank": 3, "adapter_hidden": 8}
    fixed = {"data": str(bench / "dataset"), "wandb_mode": "disabled", "device": "cpu", "num_processes": 1}
    tree = {"model": model, "train": fixed | train, "sweep": {"output": str(bench / name), **section}}
    path = bench / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(path: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipelines.cli", "sweep", str(path), *overrides]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def finish(process: subprocess.Popen, timeout_s: float = 900) -> tuple[int, str]:
    text, _ = process.communicate(timeout=timeout_s)
    return process.returncode, text


def result(bench: Path, name: str) -> dict:
    return json.loads((bench / name / "sweep.json").read_text())


PLANTED = {"num_steps": 9, "micro_batch_size": 2, "lr": 1e-3}
SPACE = {"train.lr": {"choice": [1e-5, 1e-3, 3e-3]}}


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("metric", ["loss", "validation_loss"])
def test_best_yaml_holds_what_was_trained_furthest_and_is_best_there(bench, metric):
    name = f"planted-{metric}"
    section = {"space": SPACE, "search": "grid", "metric": metric, "window": 1, "grace_steps": 3, "repeat_seeds": 1}
    code, text = finish(start(write(bench, name, PLANTED, **section)))
    assert code == 0, text
    trials = result(bench, name)["trials"]
    assert len(trials) == 3
    furthest = max(trial["step"] for trial in trials)
    assert furthest == 9
    best = min((t for t in trials if t["step"] == furthest), key=lambda t: t["value"])
    assert config.read_yaml(bench / name / "best.yaml")["train"]["lr"] == best["point"]["train.lr"]
    assert {t["state"] for t in trials} <= {"finished", "stopped"}
    assert all((t["state"] == "finished") == (t["step"] == 9) for t in trials)
    assert "step 3/9" in text


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_weight_that_only_scales_the_loss_does_not_move_the_objective(bench):
    train = PLANTED | {"lr": 1e-12, "num_steps": 3}
    section = {"space": {"train.hole_weight": {"choice": [1.0, 2.0, 4.0]}}, "search": "grid", "grace_steps": 3}
    code, text = finish(start(write(bench, "weight", train, scheduler="none", repeat_seeds=1, **section)))
    assert code == 0, text
    values = [trial["value"] for trial in result(bench, "weight")["trials"]]
    assert len(values) == 3
    assert max(values) - min(values) <= 1e-6


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_sweep_that_is_killed_goes_on_and_ends_as_one_that_was_not(bench):
    section = {"space": {"train.lr": {"log_uniform": [1e-5, 1e-2]}}, "num_trials": 5, "grace_steps": 3}
    code, text = finish(start(write(bench, "whole", PLANTED, **section, repeat_seeds=1)))
    assert code == 0, text
    path = write(bench, "killed", PLANTED, **section, repeat_seeds=1)
    for wanted in (1, 3):
        process = start(path)
        done = lambda: len(list((bench / "killed" / "trials").glob("*/train/adapter")))  # noqa: E731
        deadline = time.monotonic() + 300
        while done() < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(3)
    times = {p: p.stat().st_mtime_ns for p in (bench / "killed" / "trials").glob("*/train/adapter/*")}
    code, text = finish(start(path))
    assert code == 0, text
    assert all(p.stat().st_mtime_ns == before for p, before in times.items()), "finished trials are not repeated"

    def shown(name):
        return sorted((t["point"]["train.lr"], t["step"], round(t["value"], 9)) for t in result(bench, name)["trials"])

    assert shown("killed") == shown("whole")
    keys = [config.read_yaml(bench / name / "best.yaml")["train"]["lr"] for name in ("killed", "whole")]
    assert keys[0] == keys[1]


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ctrl_c_says_what_is_kept_and_ends_with_130(bench):
    path = write(bench, "interrupted", PLANTED | {"num_steps": 300}, space=SPACE, search="grid", grace_steps=100)
    process = start(path)
    while not list((bench / "interrupted").glob("trials/*/train/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, text = finish(process, 120)
    assert code == 130, text
    assert "are kept in" in text
    assert "best configuration" not in text


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_pbt_goes_on_from_the_winners_exact_state(bench):
    train = PLANTED | {"num_steps": 12}
    section = {"space": {"train.lr": {"log_uniform": [1e-6, 3e-2]}}, "search": "pbt", "num_trials": 4, "grace_steps": 3}
    code, text = finish(start(write(bench, "pbt", train, max_concurrent=4, cpus_per_trial=0.5, **section)))
    assert code == 0, text
    from ex4d.train import runlog

    logs = {p.parent.parent.name: runlog.read(p) for p in (bench / "pbt").glob("trials/*/train/metrics.jsonl")}
    assert len(logs) == 4
    first_steps = {name: log[0]["step"] for name, log in logs.items()}
    exploited = [name for name, step in first_steps.items() if step > 1] or [
        name for name, log in logs.items() if len({m["lr"] for m in log}) > 1
    ]
    assert exploited, "one took over another's state"
    name = exploited[0]
    changes = [m for before, m in zip(logs[name], logs[name][1:], strict=False) if m["lr"] != before["lr"]]
    taken = changes[0] if changes else logs[name][0]
    others = [m["loss"] for other, log in logs.items() if other != name for m in log if m["step"] == taken["step"]]
    assert taken["loss"] in others
