"""The result of a run (counts, reasons, exit status), and its line in run.jsonl."""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ex4d import storage
from ex4d.redact import printable, without_secrets
from pipelines.runtime.progress import Tally

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Args:
        output: the dataset folder.
        counts: videos_in, videos_split, videos_rejected, clips_planned, samples, clips_filtered, clips_bad.
        rejects: rows of rejects.parquet.
        problems: sentences for the user; the run succeeded if there are none.
        committed: True if the dataset folder now holds this run's dataset.
        stages: {stage: Tally} of the rows that this run worked on.
        worked: {pass: rows} that this run worked on, for `hash` also unchanged videos; the ledger had the others.
        scored: number of scored clips, if the run only measured scores; else None.
        has_earlier_dataset: True if the folder holds the dataset of an earlier run.
        report: path of the run's page; "" if there is none.
        retried: {key: (earlier reason, "done" or the new reason)} of rejects that were retried.
    """

    output: str
    counts: Mapping[str, int]
    rejects: Sequence[Mapping[str, str]]
    problems: Sequence[str] = ()
    committed: bool = True
    stages: Mapping[str, Tally] = field(default_factory=dict)
    worked: Mapping[str, int] = field(default_factory=dict)
    retried: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    scored: int | None = None
    has_earlier_dataset: bool = False
    report: str = ""

    @property
    def exit_code(self) -> int:
        """0 success, 1 failure."""
        return 1 if self.problems else 0

    def reasons(self) -> list[tuple[str, str, str, str, int]]:
        """Return (unit, fate, stage, reason, count), most frequent first."""
        names = ("unit", "fate", "stage", "reason")
        found = Counter(tuple(row[name] for name in names) for row in self.rejects)
        return sorted(((*key, count) for key, count in found.items()), key=lambda row: (-row[-1], row))  # type: ignore

    def table(self) -> str:
        """Return the summary for the terminal: a table of reasons, the counts and the problems."""
        from rich.console import Console
        from rich.table import Table

        text = io.StringIO()
        console = Console(file=text, width=100, markup=False)
        if self.rejects:
            table = Table("unit", "fate", "stage", "reason", "count", title="not in the dataset")
            for *names, count in self.reasons():
                table.add_row(*names, str(count))
            console.print(table)
        counts = self.counts
        console.print(
            f"videos: {counts['videos_in']} in, {counts['videos_split']} split, {counts['videos_rejected']} rejected",
            f"clips: {counts['clips_planned']} planned, "
            + (f"{counts['samples']} samples" if self.scored is None else f"{self.scored} scored")
            + f", {counts['clips_filtered']} filtered, {counts['clips_bad']} bad",
            sep="\n",
            highlight=False,
        )
        for problem in self.problems:
            console.print(problem, highlight=False, markup=False, soft_wrap=True)
        state = "dataset" if self.committed else "no dataset was written; finished work is kept in staging of"
        if self.has_earlier_dataset:
            state = "the dataset of an earlier run stands as it was; finished work is kept in staging of"
        if self.scored is not None:
            state = "scores alone were measured, and are kept for the next run, in staging of"
        console.print(f"{state}: {self.output}", highlight=False, markup=False, soft_wrap=True)
        if self.report:
            console.print(f"page: {self.report}", highlight=False, markup=False, soft_wrap=True)
        return printable(text.getvalue().rstrip())


@contextmanager
def logged(
    output: str, tallies: Mapping[str, Tally], bugs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Callable[[Result], None]]:
    """Append a line to run.jsonl however the block ends; yield a function that takes the Result.

    The line holds the time, machine and duration, the figures of each stage, the problems, and each bug's traceback.
    """
    started = time.time()
    results: list[Result] = []
    try:
        yield results.append
    finally:
        ended = Result(output, {}, [], [_how_it_ended(sys.exc_info()[1])], committed=False, stages=tallies)
        try:
            _append(results[0] if results else ended, started, bugs, settings)
        except OSError as error:  # a full disk must not hide why the run ended
            logger.warning("%s/run.jsonl is not written: %s", output, error.strerror)


def _how_it_ended(error: BaseException | None) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the next run goes on with what is missing"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return f"{type(error).__name__}: {error}"


def _append(result: Result, started: float, bugs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    line = {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="milliseconds"),
        "wall_s": round(time.time() - started, 3),
        "machine": {"node": platform.node(), "cpus": os.cpu_count(), "platform": platform.platform()},
        "settings": dict(settings),
        "counts": dict(result.counts),
        "worked": dict(result.worked),
        "stages": {name: tally.figures() for name, tally in result.stages.items()},
        "problems": list(result.problems),
        "committed": result.committed,
        "bugs": list(bugs),
    }
    text = json.dumps(without_secrets(line)) + "\n"
    url = storage.join(result.output, "run.jsonl")
    if storage.is_local(url):
        with open(storage.local_path(url), "a", opener=storage.no_links) as file:
            file.write(text)
        return
    before = storage.read_bytes(url) if storage.exists(url) else b""
    storage.write_bytes(url, before + text.encode())
