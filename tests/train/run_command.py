"""Run `ex4d train` in its own process: start it, wait for it, and read its losses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ex4d.train import runlog

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1"
}


def start(
    config: Path,
    *overrides: str,
    launcher: Sequence[str] = ("-m", "pipelines.cli", "train"),
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    """Start `python LAUNCHER CONFIG OVERRIDES` with its output piped."""
    command = [sys.executable, *launcher, str(config), *overrides]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=PLAIN | (environment or {}), **options)


def finish(process: subprocess.Popen, timeout_s: float = 600) -> tuple[int, str]:
    """Return (exit status, output) of a process that must end in time."""
    try:
        text, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, text


def steps(output: Path) -> list[dict]:
    """Return the metrics of each step that a run has logged."""
    return runlog.read(output / "metrics.jsonl")


def losses(output: Path) -> list[float]:
    return [metrics["loss"] for metrics in steps(output)]


def wait_for(what: Callable[[], object], why: str, timeout_s: float = 400) -> None:
    """Wait until `what()` is true; fail with `why` after a timeout."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"did not come: {why}"
        time.sleep(0.02)
