"""Show the progress of a run on a terminal and to Prometheus."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from ex4d import metrics
from ex4d.errors import ConfigError
from ex4d.redact import terminal
from ex4d.train.config import TrainConfig
from ex4d.train.report import NonFinite

logger = logging.getLogger(__name__)

SHOWN = ("loss", "validation_loss")
LINGER_S = 12.0  # more than two scrape intervals of prometheus.yml, less than a launcher's wait for the last rank
GAUGES = {
    "step": "Last step.",
    "loss": "Weighted loss of the last step.",
    "mse": "Plain error of the last step.",
    "validation_loss": "Last validation loss.",
    "grad_norm": "Gradient norm of the last step.",
    "lr": "Learning rate.",
    "samples_per_s": "Samples a second of all ranks.",
    "peak_memory_bytes": "Memory of the rank that needed most.",
    "processes": "Ranks.",
}


class Progress:
    """Shows a bar on a terminal, else a line every `log_every` steps, and serves metrics on a port."""

    def __init__(self, train: TrainConfig):
        self._train = train
        self._bar: Any = None
        self._first: int | None = None
        self._last: dict[str, Any] = {}
        self._last_time, self._bad_samples, self._non_finite = 0.0, 0, False
        self._serving: ExitStack | None = None

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if sys.stdout.isatty():
            from rich import console, progress

            words = (progress.TextColumn("train"), progress.TextColumn("{task.description}"))
            drawn = console.Console(file=terminal(sys.stdout))
            counts = (progress.BarColumn(), progress.MofNCompleteColumn())
            self._bar = progress.Progress(words[0], *counts, words[1], progress.TimeRemainingColumn(), console=drawn)
        return self.show

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._serving is not None:
            if isinstance(error, NonFinite):
                self._non_finite = True
                time.sleep(LINGER_S)  # lets Prometheus scrape the reason why the run ended
            self._serving.close()

    def show(self, step: dict[str, Any]) -> None:
        """Show one step. Only rank 0 calls this."""
        self._last, self._last_time = self._last | step, time.time()
        self._bad_samples += step["bad_samples"]
        if self._serving is None:
            self._serve()
        self._print(step)

    def _serve(self) -> None:
        self._serving = ExitStack()
        try:
            self._serving.enter_context(
                metrics.serving(self._train.metrics_port, self._train.metrics_host, self.families)
            )
        except ConfigError as error:  # for example, the run that this one replaces still holds the port
            logger.warning("metrics are not served: %s", error)

    def families(self) -> Iterator[Any]:
        """Yield the last step as Prometheus metrics."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, help in GAUGES.items():
            if self._last.get(name) is not None:
                yield GaugeMetricFamily(f"ex4d_train_{name}", help, value=self._last[name])
        yield GaugeMetricFamily("ex4d_train_num_steps", "Steps of the whole run.", value=self._train.num_steps)
        yield GaugeMetricFamily("ex4d_train_last_step_time", "Time of the last step, Unix.", value=self._last_time)
        yield GaugeMetricFamily(
            "ex4d_train_non_finite", "1 where the run ended by a loss that is NaN or infinite.", value=self._non_finite
        )
        yield CounterMetricFamily("ex4d_train_bad_samples", "Samples that could not be read.", value=self._bad_samples)
        parts = GaugeMetricFamily("ex4d_train_step_seconds", "Seconds of the last step.", labels=("part",))
        for part, seconds in self._last["step_s"].items():
            parts.add_metric((part,), seconds)
        yield parts

    def _print(self, step: dict[str, Any]) -> None:
        number, total = step["step"], self._train.num_steps
        words = "  ".join(f"{name.removesuffix('_loss')} {step[name]:.4f}" for name in SHOWN if step.get(name))
        words += f"  {step['step_s']['total']:.2f} s/step"
        if self._bar is not None:
            if self._first is None:
                self._first = self._bar.add_task("", total=total, completed=number)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=number, description=words)
        elif number == 1 or number % self._train.log_every == 0 or number == total:
            memory = step["peak_memory_bytes"] / 2**30
            sys.stdout.write(f"step {number}/{total}  {words}  {memory:.1f} GiB\n")  # Ray Train doubles what is printed
            sys.stdout.flush()
