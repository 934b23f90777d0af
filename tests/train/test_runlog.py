"""The run log: every step once, whatever is killed and when, and W&B as a mirror that may fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ex4d.train import runlog

OFF = {"mode": "disabled", "project": "p", "group": None}


def test_lines_after_the_checkpoint_are_written_again(tmp_path):
    log = runlog.RunLog(tmp_path, 0, OFF, {})
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    again = runlog.RunLog(tmp_path, 2, OFF, {})
    again.write({"step": 3, "loss": 30.0})
    again.close()
    assert [(m["step"], m["loss"]) for m in runlog.read(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_an_offline_run_is_kept_for_wandb_and_its_id_stays(tmp_path):
    """A real offline run with the real library, started twice: no network, no key, one id."""
    options = {"mode": "offline", "project": "ex4d-test", "group": "g"}
    ids = []
    for step in (0, 1):
        log = runlog.RunLog(tmp_path, step, options, {"lr": 1.0})
        log.write({"step": step + 1, "loss": 0.5, "step_s": {"total": 0.1}, "mse_by_sigma": [None, 1.0]})
        log.close()
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    kept = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert kept
    assert all(path.stat().st_size > 0 for path in kept)


def test_a_wandb_that_does_not_start_ends_nothing(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.Error("no room")

    monkeypatch.setattr(wandb, "init", refuse)
    log = runlog.RunLog(tmp_path, 0, {"mode": "online", "project": "p", "group": None}, {})
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


@pytest.mark.parametrize("broken", ["define_metric", "log_artifact", "log", "Artifact", "Video"])
def test_a_wandb_that_fails_at_anything_ends_nothing(broken, tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")

    def fail(*_, **__):
        raise OSError("no space left on device")

    calls = dict.fromkeys(("define_metric", "log_artifact", "log", "finish"), lambda *_, **__: None)
    if broken in calls:
        calls[broken] = fail
    else:
        monkeypatch.setattr(wandb, broken, fail)
    monkeypatch.setattr(runlog, "_start_wandb", lambda *_: SimpleNamespace(id="run", **calls))
    log = runlog.RunLog(tmp_path, 0, OFF, {})
    log.write({"step": 1, "loss": 1.0})
    log.write_validation({"step": 1, "validation_loss": 0.5, "videos": ["clip-0.mp4"], "seconds": 1.0})
    log.close()
    assert "W&B failed" in caplog.text
    assert runlog.read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    assert runlog.read(tmp_path / "validation.jsonl")[0]["validation_loss"] == 0.5


# Runs in a process of its own, since W&B complains of the loss once more when its process ends.
KILLED_SERVICE = """
import sys
import psutil
from ex4d.train import runlog
log = runlog.RunLog(sys.argv[1], 0, {"mode": "offline", "project": "ex4d-test", "group": None}, {})
service = [p for p in psutil.Process().children(recursive=True) if "wandb" in " ".join(p.cmdline())]
assert service
log.write({"step": 1, "loss": 1.0})
for process in service:
    process.kill()
    process.wait(timeout=10)
for step in range(2, 6):
    log.write({"step": step, "loss": 1.0})
log.close()
"""


def test_a_wandb_service_that_is_killed_ends_nothing(tmp_path):
    """SLURM sends SIGTERM to every process of a job, W&B's service among them; the checkpoint must still be written."""
    # Without what W&B leaves in the environment: the new process must start a service of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-c", KILLED_SERVICE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "W&B failed" in done.stderr
    assert [m["step"] for m in runlog.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_wandb_gets_a_named_chart_for_each_range_of_sigma_and_no_nulls(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    logged = []
    calls = dict.fromkeys(("define_metric", "log_artifact", "finish"), lambda *_, **__: None)
    run = SimpleNamespace(id="run", log=lambda values, step: logged.append(values), **calls)
    monkeypatch.setattr(runlog, "_start_wandb", lambda *_: run)
    log = runlog.RunLog(tmp_path, 0, OFF, {})
    errors = [None, 0.2, None, 0.4, 0.5]
    log.write({"step": 1, "loss": 1.0, "mse": None, "mse_by_sigma": errors, "step_s": {"total": 0.1}})
    log.close()
    charts = {"mse_by_sigma/0.2 to 0.4": 0.2, "mse_by_sigma/0.6 to 0.8": 0.4, "mse_by_sigma/0.8 to 1.0": 0.5}
    assert logged == [{"step": 1, "loss": 1.0, "step_s/total": 0.1, **charts}]
    assert runlog.read(tmp_path / "metrics.jsonl")[0]["mse_by_sigma"] == errors
