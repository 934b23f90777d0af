"""Send rows through stages, count each finished row, and stop the run after too many bugs."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ex4d.errors import ContractError, Ex4dError
from pipelines.runtime.progress import Progress, Watched
from pipelines.runtime.runner import Runner, through
from pipelines.runtime.stage import Counted, Row, Stage, Track, is_bug


class TooManyBugs(Ex4dError):
    """More rows than `max_bugs` allows ended in an unexpected error."""


@dataclass
class Passes:
    """Runs the passes of one job.

    Args:
        job: section of the job's settings, for messages.
        execute: the runner, from `runner.runner`.
        progress: displays the passes.
        max_bugs: rows of the whole job that may end in an unexpected error.
        worked: {pass: number of rows sent through it; for `hash`, also of unchanged videos}.
        bugs: {"key", "fate", "stage", "reason", "message", "traceback"} of each such row, for run.jsonl.
    """

    job: str
    execute: Runner
    progress: Progress
    max_bugs: int
    worked: dict[str, int] = field(default_factory=dict)
    bugs: list[dict[str, Any]] = field(default_factory=list)
    _with_bugs: set[tuple[str, str]] = field(default_factory=set)  # (pass, key)

    def run(
        self,
        name: str,
        stages: Sequence[Stage],
        rows: Iterable[Row],
        context: Any,
        keep: tuple[str, ...] = (),
        total: int | None = None,
    ) -> Iterator[Row]:
        """Yield each finished row of one pass, in any order, with its `keep` columns; the rest is as in `flow`.

        Args:
            total: number of rows; None if `rows` is a sequence.
        """
        total = len(rows) if isinstance(rows, Sequence) else total or 0
        flow = self.flow((Track(name, tuple(stages), keep),), rows, context, total, deque())
        return (row for _, row in flow)

    def flow(
        self,
        tracks: Sequence[Track],
        rows: Iterable[Row],
        context: Any,
        total: int,
        added: deque[tuple[str, Row]],
    ) -> Iterator[tuple[str, Row]]:
        """Yield (track, finished row), in any order.

        Args:
            rows: `total` rows of the first track. Seconds of video are counted for rows with a column `video_s`.
            context: passed to every stage.
            added: while the caller has a finished row, it appends to this (track, row) for rows of later tracks.

        Raises:
            TooManyBugs: the job had more than `max_bugs` bugs; finished work stays in the ledger.
        """
        tracks = [replace(track, keep=(*track.keep, "video_s")) for track in tracks]
        begun: deque[tuple[str, Row]] = deque()
        for track in tracks:
            self.worked.setdefault(track.name, 0)
        with self.progress.watch([(track.name, track.stages) for track in tracks]) as watched:
            self._expect(watched, tracks[0].name, total)
            for name, row in self.execute(tracks, Counted(rows, total), context, begun):
                watched.count(name, row, row.get("video_s") or 0.0)
                self._check(name, row)
                yield name, row
                for later, _ in added:
                    self._expect(watched, later, 1)
                begun.extend(added)
                added.clear()

    def _expect(self, watched: Watched, name: str, number: int) -> None:
        self.worked[name] += number
        watched.expect(name, number)

    def forget_bugs(self, keys: Collection[str]) -> None:
        """Drop the bugs of these rows, which turned out not to belong to the job."""
        self.bugs[:] = [bug for bug in self.bugs if bug["key"] not in keys]

    def _check(self, name: str, row: Row) -> None:
        """Record a bug, once per row and pass. Raises TooManyBugs."""
        if not is_bug(row) or (name, row["key"]) in self._with_bugs:
            return
        self._with_bugs.add((name, row["key"]))
        self.bugs.append({"key": row["key"], **row["refusal"]})
        if len(self.bugs) > self.max_bugs:
            raise TooManyBugs(
                f"stopped after {len(self.bugs)} unexpected errors, more than {self.job}.max_bugs={self.max_bugs}; "
                "their tracebacks are in run.jsonl"
            )

    def must(
        self, name: str, stage: Stage, rows: Iterable[Row], context: Any, keep: tuple[str, ...], total: int
    ) -> Iterator[Row]:
        """Yield each row after a stage that must not fail. Raises ContractError if it does."""
        with self.progress.watch([(name, (stage,))]) as watched:
            watched.expect(name, total)
            for row in through(self.execute, (stage,), Counted(rows, total), context, keep):
                watched.count(name, row, 0.0)
                if row["refusal"] is not None:
                    raise ContractError(f"{name} of {row['key']} failed: {row['refusal']['message']}")
                yield row

    def problems(self) -> list[str]:
        """Return sentences about bugs and broken machines; if there are any, the run fails after its commit."""
        count = len(self.bugs)
        bugs = [f"{count} rows ended in unexpected errors; their tracebacks are in run.jsonl"] if count else []
        return [*bugs, *self.execute.problems]
