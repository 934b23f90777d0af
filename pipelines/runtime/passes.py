"""Run a pass: send rows through stages, count each finished row, and stop the run after too many bugs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ex4d.errors import ContractError, Ex4dError
from pipelines.runtime.progress import Progress
from pipelines.runtime.runner import Runner
from pipelines.runtime.stage import Row, Stage, is_bug


class TooManyBugs(Ex4dError):
    """More rows than `max_bugs` ended in an unexpected error."""


@dataclass
class Passes:
    """Runs the passes of one job.

    Args:
        job: name of the job's section, for messages.
        execute: of `runner.runner`.
        progress: shows the passes.
        max_bugs: rows of the whole job that may end in an unexpected error.
        worked: {pass: rows that went through it}.
        bugs: {"key", "fate", "stage", "reason", "message", "traceback"} of each such row, for run.jsonl.
    """

    job: str
    execute: Runner
    progress: Progress
    max_bugs: int
    worked: dict[str, int] = field(default_factory=dict)
    bugs: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self,
        name: str,
        stages: Sequence[Stage],
        rows: Iterable[Row],
        context: Any,
        keep: tuple[str, ...] = (),
        total: int | None = None,
    ) -> Iterator[Row]:
        """Yield each finished row, in any order, with its `keep` columns.

        Args:
            rows: seconds of video are counted too, where rows have a column `video_s`.
            context: passed to every stage.
            total: number of rows; None: `rows` is a sequence.

        Raises:
            TooManyBugs: the job had more than `max_bugs`; the ledger keeps finished work.
        """
        total = len(rows) if isinstance(rows, Sequence) else total or 0
        self.worked[name] = total
        with self.progress.watch(name, stages, total) as count:
            for row in self.execute(stages, rows, context, (*keep, "video_s")):
                count(row, row.get("video_s") or 0.0)
                if is_bug(row):
                    self.bugs.append({"key": row["key"], **row["refusal"]})
                    if len(self.bugs) > self.max_bugs:
                        raise TooManyBugs(
                            f"stopped after {len(self.bugs)} unexpected errors, more than {self.job}.max_bugs="
                            f"{self.max_bugs}; their tracebacks are in run.jsonl"
                        )
                yield row

    def must(
        self, name: str, stage: Stage, rows: Iterable[Row], context: Any, keep: tuple[str, ...], total: int
    ) -> Iterator[Row]:
        """Yield each row after a stage that must succeed. Raises ContractError."""
        with self.progress.watch(name, (stage,), total) as count:
            for row in self.execute((stage,), rows, context, keep):
                count(row, 0.0)
                if row["refusal"] is not None:
                    raise ContractError(f"{name} of {row['key']} failed: {row['refusal']['message']}")
                yield row

    def problems(self) -> list[str]:
        """Return sentences on bugs and broken machines; with any, the run fails after its commit."""
        count = len(self.bugs)
        bugs = [f"{count} rows ended in unexpected errors; their tracebacks are in run.jsonl"] if count else []
        return [*bugs, *self.execute.problems]
