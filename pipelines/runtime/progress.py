"""Show the progress of a run: bars on a terminal, log lines elsewhere, and the same figures for machines.

All outputs read the same tallies, one `Tally` per stage: the bars, `OUTPUT/progress.jsonl` (a line every few seconds),
Prometheus if a port is set (on 127.0.0.1 by default), and `run.jsonl` at the end.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ex4d import metrics, storage
from ex4d.redact import terminal
from pipelines.runtime import cluster
from pipelines.runtime.stage import Row, Stage

logger = logging.getLogger(__name__)

FILE = "progress.jsonl"
_LINE_EVERY_S = 10.0
_LOG_EVERY_S = 30.0


@dataclass
class Tally:
    """Counters of one stage in this run.

    Args:
        num_cpus, num_gpus: reserved by each call.
        done: rows that the stage worked on. rejected: those of them that it rejected.
        worker_s: wall-clock seconds inside the stage, summed over workers.
        video_s: seconds of video in those rows.
    """

    num_cpus: float
    num_gpus: float
    done: int = 0
    rejected: int = 0
    worker_s: float = 0.0
    video_s: float = 0.0

    def figures(self) -> dict[str, float | int | None]:
        """Return the counters, and hours of video per reserved CPU hour and GPU hour (None without either)."""
        figures: dict[str, float | int | None] = asdict(self)
        for unit, share in (("cpu", self.num_cpus), ("gpu", self.num_gpus)):
            hours = self.worker_s * share
            figures[f"video_h_per_{unit}_h"] = round(self.video_s / hours, 4) if hours and self.video_s else None
        return figures | {"worker_s": round(self.worker_s, 4), "video_s": round(self.video_s, 4)}


@dataclass
class Pass:
    """One pass over rows: how many there are, are finished and are rejected."""

    name: str
    total: int
    done: int = 0
    rejected: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Finished rows per second."""
        return self.done / max(1e-6, time.monotonic() - self.started)

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds left at the current rate; None before the first row."""
        return (self.total - self.done) / self.rate if self.done else None

    def figures(self) -> dict[str, Any]:
        """Return the fields of the pass in progress.jsonl."""
        counts = {"pass": self.name, "done": self.done, "total": self.total, "rejected": self.rejected}
        eta_s = None if self.eta_s is None else round(self.eta_s, 1)
        return {**counts, "rate": round(self.rate, 4), "eta_s": eta_s}


class Progress:
    """The tallies of one run, and their display.

    Args:
        output: folder whose progress.jsonl gets a line every 10 s and at the end of a pass; None writes none.
        metrics_port: Prometheus can scrape http://HOST:PORT/metrics during the run; None serves nothing.
        metrics_host: address to listen on.
    """

    def __init__(self, output: str | None = None, metrics_port: int | None = None, metrics_host: str = "127.0.0.1"):
        self.output, self.metrics_port, self.metrics_host = output, metrics_port, metrics_host
        self.tallies: dict[str, Tally] = {}
        self.passes: list[Pass] = []
        self._lines: list[str] = []

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve Prometheus metrics inside the block. Raises ConfigError if the port is taken."""
        with metrics.serving(self.metrics_port, self.metrics_host, self.families):
            yield

    def families(self) -> Iterator[Any]:
        """Yield the tallies as Prometheus metric families; called at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        rows = CounterMetricFamily("ex4d_stage_rows", "Rows that a stage worked on.", labels=("stage", "outcome"))
        worker_s = CounterMetricFamily("ex4d_stage_worker_seconds", "Clock inside a stage.", labels=("stage",))
        video_s = CounterMetricFamily("ex4d_stage_video_seconds", "Video through a stage.", labels=("stage",))
        for name, tally in list(self.tallies.items()):
            rows.add_metric((name, "passed"), tally.done - tally.rejected)
            rows.add_metric((name, "rejected"), tally.rejected)
            worker_s.add_metric((name,), tally.worker_s)
            video_s.add_metric((name,), tally.video_s)
        total = GaugeMetricFamily("ex4d_pass_rows", "Rows of a pass.", labels=("pass", "state"))
        for current in list(self.passes):
            for state in ("total", "done", "rejected"):
                total.add_metric((current.name, state), getattr(current, state))
        nodes = GaugeMetricFamily("ex4d_nodes", "Nodes of the Ray cluster; lost: died unasked.", labels=("state",))
        for state, count in cluster.count_nodes().items():
            nodes.add_metric((state,), count)
        yield from (rows, worker_s, video_s, total, nodes)

    @contextmanager
    def watch(self, tracks: Sequence[tuple[str, Sequence[Stage]]]) -> Iterator[Watched]:
        """Yield an object that counts and shows the rows of these passes, (name, stages), which run side by side."""
        current = {name: self._pass(name) for name, _ in tracks}
        for _, stages in tracks:
            for stage in stages:
                self.tallies.setdefault(stage.name, Tally(stage.num_cpus, stage.num_gpus))
        with ExitStack() as closing:
            on_screen = sys.stderr.isatty()
            if on_screen:
                closing.enter_context(_bars(current, tracks, self.tallies))
            log = (lambda: None) if on_screen else _log_of(current)
            yield Watched(self, current, log, _every(_LINE_EVERY_S, lambda: self._write_line(current)))
        if any(one.total for one in current.values()):
            self._write_line(current)

    def _pass(self, name: str) -> Pass:
        """Return the pass of that name; create it if there is none."""
        found = next((one for one in self.passes if one.name == name), None)
        if found is None:
            found = Pass(name, 0)
            self.passes.append(found)
        return found

    def count(self, current: Pass, row: Row, video_s: float) -> None:
        """Count one finished row of a pass."""
        current.done += 1
        current.rejected += row["refusal"] is not None
        for name, seconds in row["seconds"].items():
            tally = self.tallies[name]
            tally.done += 1
            tally.worker_s += seconds
            tally.video_s += video_s
        if row["refusal"] is not None and row["refusal"]["stage"] in self.tallies:
            self.tallies[row["refusal"]["stage"]].rejected += 1

    def _write_line(self, passes: Mapping[str, Pass]) -> None:
        if self.output is None:
            return
        shown = [one for one in passes.values() if one.total] or list(passes.values())
        *others, last = (one.figures() for one in shown)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **last,
            **({"beside": others} if others else {}),
            "stages": {name: tally.figures() for name, tally in self.tallies.items()},
        }
        url, text = storage.join(self.output, FILE), json.dumps(line) + "\n"
        try:
            if storage.is_local(url):
                storage.local_path(url).parent.mkdir(parents=True, exist_ok=True)
                with open(storage.local_path(url), "a" if self._lines else "w", opener=storage.no_links) as file:
                    file.write(text)
                self._lines = [text]
            else:  # object stores cannot append
                self._lines.append(text)
                storage.write_bytes(url, "".join(self._lines).encode())
        except OSError as error:  # the next line includes this one
            logger.warning("%s is not written: %s", FILE, error)


def _every(seconds: float, call: Callable[[], None]) -> Callable[[], None]:
    last = time.monotonic()

    def sometimes() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            call()

    return sometimes


@dataclass(frozen=True)
class Watched:
    """Counts the rows of passes that run side by side, and shows the counts."""

    progress: Progress
    passes: Mapping[str, Pass]
    log: Callable[[], None]
    write: Callable[[], None]

    def expect(self, name: str, number: int) -> None:
        """Add rows to a pass."""
        self.passes[name].total += number

    def count(self, name: str, row: Row, video_s: float = 0.0) -> None:
        """Count one finished row, which holds `video_s` seconds of video."""
        self.progress.count(self.passes[name], row, video_s)
        self.log()
        self.write()


def _log_of(passes: Mapping[str, Pass]) -> Callable[[], None]:
    def log() -> None:
        for one in passes.values():
            if one.total:
                counts = (one.name, one.done, one.total, one.rejected, one.rate)
                logger.info("%s: %d of %d, %d rejected, %.2f/s", *counts)

    return _every(_LOG_EVERY_S, log)


@contextmanager
def _bars(
    passes: Mapping[str, Pass], tracks: Sequence[tuple[str, Sequence[Stage]]], tallies: dict[str, Tally]
) -> Iterator[None]:
    """Show progress bars of the passes and their stages inside the block."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rejected]} rejected"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    before = {stage.name: asdict(tallies[stage.name]) for _, stages in tracks for stage in stages}
    whole: dict[str, Any] = {}
    tasks: dict[tuple[str, str], Any] = {}

    class Live(Bars):
        """Bars that poll the counters when drawn, ten times a second, since rows may finish far more often."""

        def get_renderables(self) -> Iterator[Any]:
            for name, task in list(whole.items()):
                current = passes[name]
                rate, seen = f"{current.rate:.1f}/s", current.total > 0
                counts: dict[str, Any] = {"completed": current.done, "total": current.total, "visible": seen}
                self.update(task, rejected=current.rejected, rate=rate, **counts)
            for (name, stage), task in list(tasks.items()):
                current, tally = passes[name], tallies[stage]
                done, worker_s = tally.done - before[stage]["done"], tally.worker_s - before[stage]["worker_s"]
                self.update(
                    task,
                    completed=done,
                    total=current.total - (current.done - done),  # without rows that an earlier stage refused
                    rejected=tally.rejected - before[stage]["rejected"],
                    rate=f"{worker_s / done:.3f} s each" if done else "",
                    visible=current.total > 0,
                )
            yield from super().get_renderables()

    console = Console(file=terminal(sys.stderr))
    with Live(*columns, redirect_stdout=False, redirect_stderr=False, console=console) as bars:
        plain: dict[str, Any] = {"total": 0, "rejected": 0, "rate": "", "visible": False}
        whole.update({name: bars.add_task(name, **plain) for name, _ in tracks})
        for name, stages in tracks:
            tasks.update({(name, stage.name): bars.add_task(f"  {stage.name}", **plain) for stage in stages})
        yield
