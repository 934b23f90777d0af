"""What a long run shows while it runs: one line a pass with done, rejected and rate; log lines where nobody watches."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0


@dataclass
class Pass:
    """One pass over rows. `step` is called for each finished row."""

    name: str
    total: int
    bar: Any = None
    done: int = 0
    rejected: int = 0
    started: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)

    def step(self, refused: bool) -> None:
        """Count one finished row."""
        self.done += 1
        self.rejected += refused
        if self.bar is not None:
            self.bar.update(0, completed=self.done, rejected=self.rejected, rate=self.rate)
        elif time.monotonic() - self.logged > _LOG_EVERY_S:
            self.logged = time.monotonic()
            logger.info("%s: %d of %d, %d rejected, %.2f/s", self.name, *self.counts, self.rate)

    @property
    def counts(self) -> tuple[int, int, int]:
        """done, total, rejected."""
        return self.done, self.total, self.rejected

    @property
    def rate(self) -> float:
        """Finished rows a second."""
        return self.done / max(1e-6, time.monotonic() - self.started)


@contextmanager
def watched(name: str, total: int) -> Iterator[Pass]:
    """Yield a Pass that is drawn on a terminal's stderr, or logged where stderr is none."""
    if not sys.stderr.isatty() or total == 0:
        yield Pass(name, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rejected]} rejected, {task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(name, total=total, rejected=0, rate=0.0)
        yield Pass(name, total, bar)
