"""Rows of a measurement: each a process of its own with a time limit, each on disk as soon as it is measured.

A row's process calls `record`, once or several times; every call appends one line to FOLDER/rows.jsonl. What the
process prints goes to FOLDER/log.txt. A row that fails, hangs or runs out of memory costs itself: it becomes a line
that says why. Whatever ends `run_rows` itself, the lines that were written stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS_PATH = "EX4D_ROWS"  # names the file of rows to a row's process
LEAST_S = 5.0  # a row that would get less time is not started


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        name: stands in each of its lines.
        command: words of its process.
        limit_s: the process is killed after so many seconds.
        skip: why it is not to be run: what the dry run says of it, say; None: it is run.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    skip: str | None = None


def record(row: str, **figures: Any) -> None:
    """Append one line of figures to the file of rows, and print it."""
    line = json.dumps({"row": row, **figures})
    print(line, flush=True)
    if path := os.environ.get(ROWS_PATH):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file; a last line cut off by a kill is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_rows(
    rows: Sequence[Row], folder: Path, budget_s: float, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Run the rows in order and return what they recorded.

    Args:
        rows: the most valuable first.
        folder: gets rows.jsonl, which is begun anew, and log.txt.
        budget_s: of all rows; a row gets no more than what is left of it.
        environment: of the rows, instead of this process's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, start = folder / "rows.jsonl", time.monotonic()
    path.write_text("", encoding="utf-8")
    given = {**(os.environ if environment is None else environment), ROWS_PATH: str(path)}
    with open(folder / "log.txt", "wb") as log:
        for row in rows:
            left = budget_s - (time.monotonic() - start)
            why = row.skip or (None if left >= LEAST_S else "skipped: the time was used up")
            if why is None:
                why = _run(row, min(row.limit_s, left), log, given)
            if why is not None:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"row": row.name, "failed": why}) + "\n")
                print(f"{row.name}: {why}", flush=True)
    return read(path)


def _run(row: Row, limit_s: float, log: Any, environment: Mapping[str, str]) -> str | None:
    """Run one row; return None, or why it failed."""
    log.write(f"===== {row.name}\n".encode())
    log.flush()
    begin = log.tell()
    process = subprocess.Popen(
        list(row.command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=dict(environment),
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        # What it started is in its session; of a row that ended by itself nothing may hold the GPU either.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.seek(0, os.SEEK_END)
    if status == 0:
        return None
    said = Path(log.name).read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    return f"ended with {status}: {said[-1] if said else 'no message'}"[:300]


def _die_with_parent() -> None:
    # Linux alone: prctl PR_SET_PDEATHSIG = 1. Where the run is killed, no row may go on holding the GPU.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        columns: {title: format of the row's figures, e.g. "{peak_gb:.1f}"}; where a figure is missing stands "–".
    """
    lines = ["| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['row']} | {row['failed'].replace('|', '/')} |" + " |" * (len(columns) - 1))
            continue
        cells = []
        for form in columns.values():
            try:
                cells.append(form.format(**row))
            except (KeyError, TypeError, ValueError):  # not measured in this row, or None
                cells.append("–")
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return lines
