"""Small sweeps of the tiny model in real processes: their folder, their configuration, and their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "train"))

# Ray gives its workers a low priority, with which they may not even start on a busy machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
PLANTED = {"num_steps": 9, "micro_batch_size": 2, "lr": 1e-3}


def make(folder: Path) -> Path:
    """Write a dataset and a base into a folder."""
    import make_run

    make_run.make_dataset(folder)
    make_run.make_base(folder)
    return folder


def write(bench: Path, name: str, train: dict[str, Any], ray: dict[str, Any] | None = None, **sweep: Any) -> Path:
    """Write NAME.yaml, whose sweep goes to the folder NAME; return its path."""
    model = {"base": str(bench / "base"), "lora_rank": 3, "adapter_hidden": 8}
    # Stage 0 starts a third faster: DeepSpeed compiles an optimizer for the others, which these tests do not need.
    fixed = {"data": str(bench / "dataset"), "wandb_mode": "disabled", "device": "cpu", "num_processes": 1}
    tree = {"model": model, "train": fixed | {"zero_stage": 0} | train, "ray": ray or {}}
    path = bench / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | {"sweep": {"output": str(bench / name), **sweep}}))
    return path


def start(path: Path, *overrides: str) -> subprocess.Popen:
    """Start `ex4d sweep` with its output piped."""
    command = [sys.executable, "-m", "pipelines.cli", "sweep", str(path), *overrides]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, start_new_session=True, **options)


def finish(process: subprocess.Popen, timeout_s: float = 1500) -> tuple[int, str]:
    """Return the exit status of a sweep and what it printed."""
    text, _ = process.communicate(timeout=timeout_s)
    return process.returncode, text


def result(bench: Path, name: str) -> dict[str, Any]:
    """Return the contents of sweep.json."""
    return json.loads((bench / name / "sweep.json").read_text())
