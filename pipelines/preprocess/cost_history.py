"""The accuracy of earlier plans on this machine: what they predicted, against what their runs took."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ex4d import storage


def remember(output: str, cpu_s_per_video: float) -> None:
    """Append a plan to this machine's history of plans."""
    output = str(storage.local_path(output).resolve()) if storage.is_local(output) else output
    line = {"time": time.time(), "output": output, "cpu_s_per_video": cpu_s_per_video}
    history = history_file()
    history.parent.mkdir(parents=True, exist_ok=True)
    with open(history, "a") as file:
        file.write(json.dumps(line) + "\n")


def history_file() -> Path:
    """Return the path of this machine's history of plans, under XDG_STATE_HOME."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ex4d" / "plans.jsonl"


def earlier_errors() -> list[float]:
    """Return the relative error, predicted / actual - 1, in CPU seconds per video of each plan whose run has ended."""
    file = history_file()
    errors = []
    for line in file.read_text().splitlines() if file.exists() else ():
        earlier = json.loads(line)
        actual = _actual_cpu_s(earlier["output"], earlier["time"])
        if actual:
            errors.append(earlier["cpu_s_per_video"] / actual - 1)
    return errors


def judgement(errors: Sequence[float]) -> str:
    """Return a sentence on the accuracy of earlier plans."""
    if not errors:
        return "no earlier plan of this machine has been run yet"
    middle, worst = statistics.median(errors), max(errors, key=abs)
    return f"{len(errors)} earlier plans of this machine were off by {middle:+.0%} (median), {worst:+.0%} (worst)"


def _actual_cpu_s(output: str, since: float) -> float | None:
    """Return CPU s per video of the runs in a folder since a time, up to the first that committed, or None."""
    url = storage.join(output, "run.jsonl")
    spent = 0.0
    for text in storage.read_bytes(url).decode().splitlines() if storage.exists(url) else ():
        line = json.loads(text)
        if datetime.fromisoformat(line["started"]).timestamp() + line["wall_s"] < since:
            continue
        spent += sum(stage["worker_s"] * stage["num_cpus"] for stage in line["stages"].values())
        if line["committed"]:
            return spent / line["counts"]["videos_in"] if spent else None
    return None
