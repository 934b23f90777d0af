"""The contents of an offline W&B run, read from its own file: metrics, run artifact, videos, one id, no API key."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ex4d import video
from ex4d.train import runlog

KEY = "0123456789abcdef0123456789abcdef01234567"
OPTIONS = {"mode": "offline", "project": "ex4d-test", "group": "g"}
FACTS = {"train": {"lr": 1e-3}, "versions": {"torch": "2"}, "dataset": "d" * 64, "commit": "c" * 40}

# Two starts of one run, in a process of their own with a key in its environment.
WRITE = """
import json, sys
from ex4d.train import runlog
output, options, facts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for first in (0, 2):
    log = runlog.RunLog(output, first, options, facts)
    for step in (first + 1, first + 2):
        log.write({"step": step, "loss": step / 10, "step_s": {"total": 0.1, "communication": 0.01}})
    video = "validation/step-000001/clip-0.mp4"
    log.write_validation({"step": first + 1, "validation_loss": 0.25, "videos": [video], "seconds": 1.0})
    log.write({"step": first + 3, "loss": 0.9})
    log.close()
"""


def records(path: Path) -> list:
    """Return the records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, found, partial = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        partial += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            found.append(record)
            partial = b""
    return found


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "validation" / "step-000001").mkdir(parents=True)
    frames = np.zeros((5, 32, 96, 3), np.uint8)
    video.write(folder / "validation" / "step-000001" / "clip-0.mp4", frames, 8.0)
    (folder / "config.yaml").write_text("train: {lr: 0.001}\n")
    # Without what W&B leaves in the environment of this process: the new one must start a service of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-c", WRITE, str(folder), json.dumps(OPTIONS), json.dumps(FACTS)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment | {"WANDB_API_KEY": KEY}
    )
    assert done.returncode == 0, done.stderr
    assert "W&B failed" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def runs(output) -> list[list]:
    found = [records(path) for path in sorted(output.glob("wandb/offline-run-*/run-*.wandb"))]
    assert len(found) == 2
    return found


def history(run: list) -> list[dict]:
    found: list[dict] = []
    for record in run:
        if record.HasField("history"):
            found.append({})
            for item in record.history.item:
                *parents, leaf = item.nested_key or [item.key]
                place = found[-1]
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[leaf] = json.loads(item.value_json)
    return found


def test_metrics_are_in_it_step_by_step(runs):
    for first, run in zip((0, 2), runs, strict=True):
        logged = {row["step"]: row["loss"] for row in history(run) if "step" in row}
        assert logged == {first + 1: (first + 1) / 10, first + 2: (first + 2) / 10, first + 3: 0.9}
    assert any("step_s/communication" in row for row in history(runs[0]))


def test_a_validation_stands_at_its_own_step_with_its_video(runs, output):
    (row,) = [row for row in history(runs[0]) if "validation/step" in row]
    assert (row["validation/step"], row["validation/validation_loss"]) == (1, 0.25)
    assert row["validation/clip-0"]["_type"] == "video-file"
    kept = list(output.glob(f"wandb/offline-run-*/files/{row['validation/clip-0']['path']}"))
    original = (output / "validation" / "step-000001" / "clip-0.mp4").read_bytes()
    assert [path.read_bytes() for path in kept] == [original]
    axes = {r.metric.glob_name: r.metric.step_metric for r in runs[0] if r.HasField("metric") and r.metric.glob_name}
    assert axes == {"validation/*": "validation/step"}


def test_the_artifact_says_what_ran(runs):
    for run in runs:
        found = [r.artifact if r.HasField("artifact") else r.request.log_artifact.artifact for r in run]
        (artifact,) = [a for a in found if a.type == "run"]
        files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        assert files.keys() == {"run.json", "config.yaml"}
        assert json.loads(files["run.json"].read_text()) == FACTS


def test_the_run_is_one_run_and_its_configuration_is_in_it(runs, output):
    ids = {record.run.run_id for run in runs for record in run if record.HasField("run")}
    assert ids == {(output / "wandb_run_id").read_text()}
    (config,) = [record.run.config for record in runs[0] if record.HasField("run") and record.run.config.update][:1]
    assert {item.key for item in config.update} >= {"train", "versions", "dataset", "commit"}


def test_no_key_is_anywhere(output):
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_the_commit_is_this_source_s(root):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    if head.returncode != 0:
        pytest.skip("not a repository")
    assert runlog.commit().rstrip("+") == head.stdout.strip()
