"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ex4d.train.config import TrainConfig

SHOWN = ("loss", "validation_loss")


class Progress:
    """What a person sees of a run: a bar on a terminal, a line every `log_every` steps elsewhere."""

    def __init__(self, train: TrainConfig):
        self._train = train
        self._bar: Any = None
        self._first: int | None = None

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if sys.stdout.isatty():
            from rich import progress

            words = (progress.TextColumn("train"), progress.TextColumn("{task.description}"))
            counts = (progress.BarColumn(), progress.MofNCompleteColumn())
            self._bar = progress.Progress(words[0], *counts, words[1], progress.TimeRemainingColumn())
        return self.show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, metrics: dict[str, Any]) -> None:
        """Show one step."""
        step, total = metrics["step"], self._train.num_steps
        words = "  ".join(f"{name.removesuffix('_loss')} {metrics[name]:.4f}" for name in SHOWN if metrics.get(name))
        words += f"  {metrics['step_s']['total']:.2f} s/step"
        if self._bar is not None:
            if self._first is None:
                self._first = self._bar.add_task("", total=total, completed=step)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=step, description=words)
        elif step == 1 or step % self._train.log_every == 0 or step == total:
            memory = metrics["peak_memory_bytes"] / 2**30
            sys.stdout.write(f"step {step}/{total}  {words}  {memory:.1f} GiB\n")  # Ray Train doubles what is printed
            sys.stdout.flush()
