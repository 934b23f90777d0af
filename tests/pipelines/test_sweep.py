"""The sweep's own parts. A whole sweep over the tiny model is in tests/test_end_to_end.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ex4d.errors import ConfigError, ContractError
from pipelines.train import sweep


def test_values_are_put_into_a_copy():
    tree = {"train": {"lr": 1.0, "betas": [0.9, 0.99]}}
    changed = sweep.with_values(tree, {"train.lr": 2.0, "model.lora_rank": 4})
    assert changed == {"train": {"lr": 2.0, "betas": [0.9, 0.99]}, "model": {"lora_rank": 4}}
    assert tree == {"train": {"lr": 1.0, "betas": [0.9, 0.99]}}


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"sweep.lr": {"uniform": [0, 1]}}, "train. or model."),
        ({"train.lr": {"gauss": [0, 1]}}, "log_uniform"),
        ({"train.lr": {"uniform": [1]}}, "low, high"),
        ({"train.lr": {"choice": []}}, "values"),
        ({"train.lr": {"log_uniform": [-1, 1]}}, r"sweep\.space\.train\.lr"),
        ({"train.lr": {"uniform": ["a", "b"]}}, r"sweep\.space\.train\.lr"),
        ({"train.lr": {"uniform": [0, 1], "choice": [1]}}, "one of"),
    ],
)
def test_a_space_that_is_not_understood_is_named(space, named):
    with pytest.raises(ConfigError, match=named):
        sweep.search_space(space)


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
    steps = [record["step"] for record in sweep.follow(path, process, poll_s=0.05)]
    assert steps == [0, 1, 2, 3, 4]
    assert process.returncode == 0


def test_the_table_puts_the_best_first_and_its_yaml_can_be_read(tmp_path, capsys):
    from ex4d import config

    class Result:
        def __init__(self, lr, value, error=None):
            self.config, self.metrics, self.error = {"train.lr": lr}, {"value": value, "step": 9}, error

    settings = sweep.SweepConfig(output=str(tmp_path), space={"train.lr": {"uniform": [0.0, 1.0]}})
    results = [Result(0.1, 3.0), Result(0.2, 1.0), Result(0.3, 0.5, error=RuntimeError("lost"))]
    assert sweep.report(results, {"train": {"num_steps": 9}}, settings) == 0
    best = config.read_yaml(tmp_path / "best.yaml")
    assert best == {"train": {"num_steps": 9, "lr": 0.2, "output": str(tmp_path / "best")}}
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["state"] for row in rows] == ["done", "done", "failed"]
    assert "best.yaml" in capsys.readouterr().out


def test_a_sweep_whose_trials_all_failed_ends_with_1(tmp_path):
    class Result:
        config, metrics, error = {"train.lr": 1.0}, None, RuntimeError("no")

    assert sweep.report([Result()], {}, sweep.SweepConfig(output=str(tmp_path))) == 1
    assert not (tmp_path / "best.yaml").exists()


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


def test_an_empty_section_takes_values():
    assert sweep.with_values({"train": None}, {"train.lr": 1.0}) == {"train": {"lr": 1.0}}
