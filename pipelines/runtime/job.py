"""The frame of a job with a ledger: lock the output folder, show progress, start the runner, log how the run ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from pipelines.runtime import runner
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.output import exclusive
from pipelines.runtime.passes import Passes, TooManyBugs
from pipelines.runtime.progress import Progress
from pipelines.runtime.result import Result, logged
from pipelines.runtime.runner import RayConfig


class Settings(Protocol):
    """Settings that every such job has."""

    @property
    def output(self) -> str: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def max_bugs(self) -> int: ...
    @property
    def max_attempts(self) -> int: ...
    @property
    def metrics_port(self) -> int | None: ...
    @property
    def metrics_host(self) -> str: ...


class Job(Protocol):
    """One run of a job."""

    problems: list[str]

    def judge(self) -> None:
        """Commit the dataset, unless too many rows were bad."""

    def finish(self) -> Result:
        """Return the result of the run."""


@contextmanager
def opened(
    name: str, config: Settings, ray_config: RayConfig | None, runner_name: str
) -> Iterator[tuple[Passes, Callable[[Result], None]]]:
    """Open a job's output and runner; yield its passes, and a function that takes the Result for run.jsonl.

    Args:
        name: section of the job's settings.
        runner_name: "ray", or "inline": row by row in this process, where unexpected errors propagate.
    """
    bugs: list[dict[str, Any]] = []
    how = {"runner": runner_name, "num_workers": config.num_workers}
    progress = Progress(config.output, config.metrics_port, config.metrics_host)
    attempts = Attempts(config.output, config.max_attempts)
    with (
        exclusive(config.output),
        progress.serving(),
        runner.runner(runner_name, ray_config or RayConfig(), config.num_workers, attempts) as execute,
        logged(config.output, progress.tallies, bugs, how) as end,
    ):
        yield Passes(name, execute, progress, config.max_bugs, bugs=bugs), end


def complete(job: Job, work: Callable[[], None]) -> Result:
    """Do the job's work, commit it unless it was stopped by too many bugs, and return the Result."""
    try:
        work()
    except TooManyBugs as error:
        job.problems.append(str(error))
    else:
        job.judge()
    return job.finish()
