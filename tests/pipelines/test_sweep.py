"""The components of a sweep; test_sweep_runs.py and test_sweep_kills.py test whole sweeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from ex4d import config
from ex4d.errors import ConfigError, ContractError
from pipelines.runtime.output import exclusive
from pipelines.train import sweep, sweep_board, sweep_report, sweep_trial, sweep_tune
from pipelines.train.sweep_space import Space, with_values


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
        ({"train.num_steps": {"choice": [1, 2]}}, "the sweep sets it"),
        ({"train.expert": {"choice": ["high", "low"]}}, "sweep each, with train.expert=high or low"),
        ({"train.lr": {"uniform": [0.1, 1], "when": {"train.lr_decay": ["none"]}}}, "of earlier settings"),
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
        ({"search": "pbt", "max_concurrent": 3}, "max_concurrent=3: must be at least 4"),
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
        "ended": True,
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
        ("train.num_steps=3", ContractError),  # there is no dataset
    ],
)
def test_what_every_trial_would_trip_over_is_said_before_the_first(tmp_path, monkeypatch, override, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.yaml").write_text("train:\nsweep: {num_trials: 1}\n")
    monkeypatch.setattr(sweep_tune, "search", lambda *_: pytest.fail("a trial was started"))
    with pytest.raises(error):
        sweep.command("some.yaml", [override])


def test_without_a_validation_split_no_trial_validates(tmp_path, monkeypatch):
    import sweep_bench
    from make_run import make_dataset

    make_dataset(tmp_path, val=0)
    trees = []
    monkeypatch.setattr(sweep, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sweep, "_check_gpus", lambda *_: None)  # asks Ray
    monkeypatch.setattr(sweep_tune, "search", lambda _, tree: trees.append(tree) or [])
    path = sweep_bench.write(tmp_path, "mse", {"num_steps": 6}, metric="mse", grace_steps=3, repeat_seeds=1)
    with pytest.raises(ConfigError, match=r"validate_every.*has no validation samples"):
        sweep.command(str(path), ["train.validate_every=2"])
    with pytest.raises(ConfigError, match=r"train\.expert='?low'?: must be null"):
        sweep.command(str(path), ["train.expert=low", "model.base=tiny"])
    assert trees == []
    sweep.command(str(path), ["model.base=tiny"])
    assert trees[0]["train"]["save_every"] == 3
    assert trees[0]["train"].get("validate_every") is None


def test_the_advice_on_gpus_can_be_followed_in_the_same_folder(tmp_path, monkeypatch):
    """What is refused for the machine's GPUs is not recorded as the folder's settings."""
    import ray
    import sweep_bench
    from make_run import make_dataset

    make_dataset(tmp_path)
    trees = []
    monkeypatch.setattr(sweep, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0})
    monkeypatch.setattr(sweep_tune, "search", lambda _, tree: trees.append(tree) or [])
    path = sweep_bench.write(tmp_path, "one", {"num_steps": 6, "device": "auto"}, max_concurrent=2, repeat_seeds=1)
    overrides = ["model.base=tiny", "train.num_processes=1"]
    with pytest.raises(ConfigError, match=r"gpus_per_trial=0\.0: must be set.*or set train\.device=cpu"):
        sweep.command(str(path), overrides)
    sweep.command(str(path), [*overrides, "train.device=cpu"])
    assert [tree["train"]["device"] for tree in trees] == ["cpu"]


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path):
    import sweep_bench
    from make_run import make_dataset

    make_dataset(tmp_path)
    path = sweep_bench.write(tmp_path, "one", {})
    with exclusive(str(tmp_path / "one")), pytest.raises(ConfigError, match="another run is writing there"):
        sweep.command(str(path), ["model.base=tiny"])


# ---------------------------------------------------------------- what is shown


def trial(status: str, lr: float, **result) -> SimpleNamespace:
    return SimpleNamespace(trial_id=str(lr), status=status, config={"train.lr": lr}, last_result=result)


def log_of(folder, values: dict[int, float], seconds: float = 0.5):
    """Write a metrics.jsonl whose last line is incomplete."""
    (folder / "train").mkdir(parents=True)
    lines = [{"step": k, "validation_loss": v, "step_s": {"total": seconds}} for k, v in values.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train" / "metrics.jsonl").write_text(text + '{"step": 99')


def folder_of(settings, lr: float):
    return sweep_trial.trial_folder(settings, {"train.lr": lr}, {"train": {}}, "")


def test_the_board_knows_of_steps_between_two_reports(tmp_path, capsys):
    from pipelines.train.sweep_tune import Board

    settings = sweep.SweepConfig(output=str(tmp_path), space={"train.lr": {"choice": [0.1, 0.2, 0.3, 0.4]}})
    log_of(folder_of(settings, 0.3), {3: 2.0, 5: 1.9})
    trials = [
        trial("TERMINATED", 0.1, step=9, value=1.0),
        trial("TERMINATED", 0.2, step=3, value=3.0),
        trial("RUNNING", 0.3, step=3, value=2.0),
        trial("PENDING", 0.4),
    ]
    board = Board("sweep", settings, {"train": {"num_steps": 9}})
    rows = board.rows(trials)
    assert [row.state for row in rows] == ["finished", "stopped", "running", "waiting"]
    assert (rows[2].step, rows[2].value, rows[2].rate, rows[2].eta_s) == (5, 2.0, 2.0, 2.0)
    assert [row.state for row in sweep_board.interrupted(rows)] == ["finished", "stopped", *["interrupted"] * 2]
    display = sweep_board.Display("sweep", 12, "validation_loss", 9)
    display.show(rows)
    display.show(rows)
    text = capsys.readouterr().out
    assert text.count("trial 1 (lr=0.1) finished, step 9/9, validation_loss 1.00000") == 1, "said once"
    assert "trial 3 (lr=0.3) running, step 5/9, validation_loss 2.00000, 2 steps/s, 2 s to its end" in text
    assert "4 of 12 trials: 1 finished, 1 stopped, 1 waiting, 1 running; best validation_loss 1.00000: trial 1" in text
    assert display.table(rows).row_count == 4


def test_a_scheduler_made_anew_remembers_what_trials_reported(tmp_path):
    """Ray Tune restores its trials, but not the results by which ASHA compares them."""
    from pipelines.train.sweep_schedule import scheduler

    space = {"train.lr": {"choice": [0.1, 0.2, 0.3]}}
    settings = sweep.SweepConfig(output=str(tmp_path), space=space, grace_steps=3)
    tree = {"train": {"num_steps": 9}}
    log_of(folder_of(settings, 0.1), {3: 1.0, 6: 0.9, 9: 0.8})
    log_of(folder_of(settings, 0.2), {3: 1.5, 6: 0.1})
    made = scheduler(settings, Space.of(space), tree)
    made.set_search_properties("value", "min")
    done, going, new = trial("TERMINATED", 0.1, step=9), trial("PENDING", 0.2, step=3), trial("PENDING", 0.3)
    for each in (done, going, new):
        made.on_trial_add(None, each)
    assert made.on_trial_result(None, going, {"step": 3, "value": 1.5}) == "CONTINUE", "judged before"
    assert made.on_trial_result(None, new, {"step": 3, "value": 1.4}) == "STOP", "worse than the median of 1.0 and 1.5"
    assert made.on_trial_result(None, going, {"step": 6, "value": 0.95}) == "STOP", "step 6 was not reported before"


def test_pbt_stays_on_the_choices_and_steps_of_the_space(tmp_path):
    from ray.tune.schedulers.pbt import _explore

    from pipelines.train.sweep_schedule import scheduler

    space = {
        "train.ema_decay": {"choice": [0.9, 0.99, None]},
        "train.hole_weight": {"uniform": [1, 4, 0.5]},
        "train.lr": {"log_uniform": [1e-5, 1e-3]},
    }
    section = {"output": str(tmp_path), "space": space, "search": "pbt", "max_concurrent": 4, "grace_steps": 3}
    made = scheduler(sweep.SweepConfig(**section), Space.of(space), {"train": {"num_steps": 9}})
    point = {"train.ema_decay": 0.99, "train.hole_weight": 2.5, "train.lr": 1e-3}
    for _ in range(100):
        point, _ = _explore(point, made._hyperparam_mutations, 0.25, (1.2, 0.8), made._custom_explore_fn)
        assert point["train.ema_decay"] in (0.9, 0.99, None)
        assert point["train.hole_weight"] in np.arange(1, 4.5, 0.5)
        assert 1e-5 <= point["train.lr"] <= 1e-3


def test_a_limit_below_the_trials_under_way_is_refused(monkeypatch):
    trials = [trial(status, 0.1) for status in ("TERMINATED", "RUNNING", "PENDING", "PAUSED", "ERROR")]
    before = SimpleNamespace(_local_tuner=SimpleNamespace(_experiment_analysis=SimpleNamespace(trials=trials)))
    monkeypatch.setattr(sweep_tune, "_before", lambda *_: before)
    sweep_tune.check_limit(sweep.SweepConfig(max_concurrent=3), {})
    with pytest.raises(ConfigError, match=r"max_concurrent=2: must be at least 3"):
        sweep_tune.check_limit(sweep.SweepConfig(max_concurrent=2), {})
    before._local_tuner._experiment_analysis = None  # killed before its first trial
    sweep_tune.check_limit(sweep.SweepConfig(max_concurrent=1), {})


def test_state_of_another_user_is_not_unpickled(tmp_path, monkeypatch):
    settings = sweep.SweepConfig(output=str(tmp_path))
    (tmp_path / "tune" / "search").mkdir(parents=True)
    (tmp_path / "tune" / "search" / "tuner.pkl").write_bytes(b"")
    monkeypatch.setattr("ray.tune.Tuner.can_restore", lambda path: True)
    monkeypatch.setattr("ray.tune.Tuner.restore", lambda *_, **__: pytest.fail("restored"))
    real = sweep_tune.Path.lstat
    strange = SimpleNamespace(st_uid=12345)
    monkeypatch.setattr(sweep_tune.Path, "lstat", lambda path: strange if path.name == "tuner.pkl" else real(path))
    with pytest.raises(ConfigError, match="belongs to another user"):
        sweep_tune.check_limit(settings, {"train": {}})


def test_names_that_older_sweeps_have_pickled_are_still_there():
    assert callable(sweep_tune._folder)
    assert callable(sweep_tune._inside)


def test_a_sweep_of_other_samples_is_refused(tmp_path, monkeypatch):
    """Trials of an earlier start trained on the samples that were there then."""
    import sweep_bench
    from make_run import make_dataset

    make_dataset(tmp_path)
    monkeypatch.setattr(sweep, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sweep, "_check_gpus", lambda *_: None)  # asks Ray
    monkeypatch.setattr(sweep_tune, "search", lambda *_: [])
    path = sweep_bench.write(tmp_path, "one", {"num_steps": 6}, grace_steps=3, repeat_seeds=1)
    sweep.command(str(path), ["model.base=tiny"])
    sweep.command(str(path), ["model.base=tiny", "sweep.num_trials=6"])
    dataset = tmp_path / "dataset" / "dataset.json"
    dataset.write_text(dataset.read_text().replace("{", '{"more": 1,', 1))
    with pytest.raises(ConfigError, match=r"train\.data=.*holds other samples"):
        sweep.command(str(path), ["model.base=tiny", "sweep.num_trials=8"])


@pytest.mark.parametrize(
    ("there", "is_own_ray", "chosen", "train", "named"),
    [
        (8, True, {"max_concurrent": 2}, {}, r"gpus_per_trial=0\.0: must be set, for each trial"),
        (8, False, {}, {}, r"gpus_per_trial=0\.0: must be set, for each trial"),
        (2, True, {"gpus_per_trial": 4.0}, {}, "must be at most 2, the GPUs of this machine"),
        (0, True, {"gpus_per_trial": 1.0}, {}, "must be at most 0, the GPUs of this machine"),
        (0, True, {"gpus_per_trial": 1.0}, {"device": "cpu"}, "must be at most 0, the GPUs of this machine"),
        (8, True, {"gpus_per_trial": 2.0}, {"num_processes": 4}, "must be at least 4, train.num_processes"),
        (8, True, {}, {}, None),
        (0, True, {"max_concurrent": 2}, {}, None),
        (0, False, {"gpus_per_trial": 8.0}, {"num_processes": 8}, None),
        (8, True, {"max_concurrent": 2, "gpus_per_trial": 0.5}, {"num_processes": 1}, None),
        (8, True, {"max_concurrent": 2}, {"device": "cpu"}, None),
        (8, False, {"max_concurrent": 2}, {"launcher": "ray", "num_processes": 8}, None),
    ],
)
def test_trials_that_would_share_or_never_get_their_gpus_are_refused(
    there, is_own_ray, chosen, train, named, monkeypatch
):
    import ray

    from ex4d.train.config import TrainConfig

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": float(there)})
    with pytest.raises(ConfigError, match=named) if named else nullcontext():
        sweep._check_gpus(sweep.SweepConfig(**chosen), TrainConfig(**train), is_own_ray)
