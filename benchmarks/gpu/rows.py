"""Run the rows of a measurement, each in its own process with a time limit, and write each to disk at once.

A row's process calls `record`, once or several times; every call appends one line to FOLDER/rows.jsonl. The output of
the process goes to FOLDER/log.txt. A row that fails, hangs or runs out of memory does not affect the others: it becomes
a line with the reason. However `run_rows` itself ends, the lines written so far remain.
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

ROWS_PATH = "EX4D_ROWS"  # environment variable that tells a row's process the file of rows
LEAST_S = 5.0  # a row with less time than this is not started


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        name: written in each of its lines.
        command: command line of its process.
        limit_s: the process is killed after this many seconds.
        skip: why not to run it, for example by its memory estimate; None: run it.
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
    """Return the rows of a file, without a last line that a kill has cut off."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_rows(
    rows: Sequence[Row], folder: Path, budget_s: float, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Run the rows in order and return what they recorded.

    Args:
        rows: most valuable first.
        folder: where to write rows.jsonl, replacing an earlier one, and log.txt.
        budget_s: for all rows; a row gets at most the time that is left.
        environment: of the rows' processes, instead of this process's own.
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
    """Run one row; return None, or the reason for its failure."""
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
        # Kill the row's session: also after a normal end, no child process may keep holding the GPU.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.seek(0, os.SEEK_END)
    if status == 0:
        return None
    said = Path(log.name).read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    return f"ended with {status}: {said[-1] if said else 'no message'}"[:300]


def _die_with_parent() -> None:
    # Linux only: prctl PR_SET_PDEATHSIG = 1. If the run is killed, no row may keep holding the GPU.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        columns: {title: format of the row's figures, e.g. "{peak_gb:.1f}"}; a missing figure is shown as "–".
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
