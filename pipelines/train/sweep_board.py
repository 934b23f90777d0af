"""Show the progress of a sweep: on a terminal as a table that is redrawn every second, elsewhere as lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DRAW_EVERY_S, LINES_EVERY_S = 1.0, 30.0
MAX_ROWS = 30
TAIL_BYTES = 16384
STATES = {"PENDING": "waiting", "RUNNING": "running", "PAUSED": "paused", "ERROR": "failed"}  # Ray Tune's states
UNDER_WAY = ("waiting", "running", "paused")


@dataclass(frozen=True)
class Row:
    """One row of the table. `value` is from the last comparison, `step` may be later; `rate` is in steps per second."""

    number: int
    point: str
    state: str
    step: int
    value: float | None
    rate: float | None
    eta_s: float | None

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells as text."""
        value = "–" if self.value is None else f"{self.value:.5f}"
        rate = "–" if self.rate is None else f"{self.rate:.3g}/s"
        return str(self.number), self.point, self.state, str(self.step), value, rate, duration(self.eta_s)


def row(number: int, status: str, point: Mapping[str, Any], result: Mapping[str, Any], log: Path, last: int) -> Row:
    """Return the row of a trial.

    Args:
        status: Ray Tune's. point: {key: value}. result: the last report, {} before the first.
        log: its metrics.jsonl, which has the steps between two reports. last: the step at which trials end.
    """
    step, value = int(result.get("step") or 0), result.get("value")
    state = STATES.get(status, "finished" if step >= last else "stopped")
    rate = eta = None
    if state == "running":
        record = last_record(log)
        step = max(step, int(record.get("step", 0)))
        seconds = (record.get("step_s") or {}).get("total")
        rate = 1 / seconds if seconds else None
        eta = (last - step) * seconds if seconds else None
    named = ", ".join(f"{key.split('.', 1)[-1]}={short(item)}" for key, item in point.items())
    return Row(number, named, state, step, value, rate, eta)


def last_record(path: Path) -> dict[str, Any]:
    """Return the last complete object of a growing JSON-lines log; {} if there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            record = json.loads(file.read().split(b"\n")[-2])
    except (OSError, ValueError, IndexError):
        return {}
    return record if isinstance(record, dict) else {}


def interrupted(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a sweep that a signal ended: trials that were under way become "interrupted"."""
    return [replace(r, state="interrupted", rate=None, eta_s=None) if r.state in UNDER_WAY else r for r in rows]


def summary(rows: Sequence[Row], total: int, metric: str) -> str:
    """Return one line about all trials: how many are in each state, and the best value so far."""
    names = ("finished", "stopped", "failed", *UNDER_WAY, "interrupted")
    counts = [f"{count} {name}" for name in names if (count := sum(r.state == name for r in rows))]
    usable = [r for r in rows if r.state != "failed" and r.value is not None and math.isfinite(r.value)]
    best = min((r for r in usable if r.state == "finished"), key=lambda r: r.value or 0.0, default=None)
    best_text = f"; best {metric} {best.value:.5f}: trial {best.number}" if best else ""
    return f"{len(rows)} of {total} trials: {', '.join(counts) or 'none yet'}{best_text}"


class Display:
    """Shows rows; nothing is printed before the first `show`, and `close` leaves the last table on the terminal.

    Args:
        total: number of planned trials. metric: what is minimised. last: the step at which trials end.
    """

    def __init__(self, title: str, total: int, metric: str, last: int):
        self.title, self.total, self.metric, self.last = title, total, metric, last
        self._live: Any = None
        self._last_lines: dict[int, tuple[Any, ...]] = {}
        self._start = time.monotonic()
        self._drawn_s = self._repeated = -math.inf

    def show(self, rows: Sequence[Row]) -> None:
        """Show the current rows; on a terminal the table is redrawn."""
        self._drawn_s = time.monotonic()
        if not sys.stdout.isatty():
            self._say_changes(rows)
            return
        if self._live is None:
            from rich.live import Live

            self._live = Live(auto_refresh=False, vertical_overflow="ellipsis")
            self._live.start()
        self._live.update(self.table(rows), refresh=True)

    def due(self) -> bool:
        """Return True if an update is due."""
        return time.monotonic() - self._drawn_s >= DRAW_EVERY_S

    def close(self) -> None:
        """Stop updating and leave the last table on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, rows: Sequence[Row]) -> Any:
        """Return the table: trials under way first, then by step, then by value."""
        from rich.table import Table

        passed = duration(time.monotonic() - self._start)
        table = Table(title=f"{self.title}: {summary(rows, self.total, self.metric)}; {passed}", title_justify="left")
        for column in ("trial", "settings", "state", "step", self.metric, "rate", "to its end"):
            table.add_column(column, justify="left" if column in ("settings", "state") else "right")
        order = sorted(rows, key=lambda r: (r.state not in UNDER_WAY, r.state == "failed", -r.step, r.value or 0.0))
        for shown in order[:MAX_ROWS]:
            table.add_row(*shown.cells())
        if len(order) > MAX_ROWS:
            table.caption = f"and {len(order) - MAX_ROWS} more"
        return table

    def _say_changes(self, rows: Sequence[Row]) -> None:
        """Print a line for each trial whose state or value changed; every 30 s also for all running trials."""
        again = time.monotonic() - self._repeated >= LINES_EVERY_S
        for row in rows:
            news = (row.state, row.value)
            running = row.state == "running" and again
            if (news == self._last_lines.get(row.number) and not running) or row.state in ("waiting", "paused"):
                continue
            self._last_lines[row.number] = news
            value = "" if row.value is None else f", {self.metric} {row.value:.5f}"
            rate = "" if row.rate is None else f", {row.rate:.3g} steps/s, {duration(row.eta_s)} to its end"
            at = f"step {row.step}/{self.last}"
            self._print(f"trial {row.number} ({row.point}) {row.state}, {at}{value}{rate}")
        if again and rows:
            self._repeated = time.monotonic()
            self._print(summary(rows, self.total, self.metric))

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:6.0f} s] {self.title}: {text}", flush=True)


def short(value: Any) -> str:
    """Format a setting's value briefly."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """Format a duration in s as readable text."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
