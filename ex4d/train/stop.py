"""Handle requests to stop: a signal may reach any rank at any moment of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def stop_signal(instead: Callable[[], bool] | None = None) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or Ctrl-C arrived; inside the block neither ends the process.

    Args:
        instead: yielded as it is, if set: Ray Train runs the loop in a thread, where signals cannot be handled.
    """
    if instead is not None:
        yield instead
        return
    requested = threading.Event()
    before = {number: signal.signal(number, lambda *_: requested.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(requested: bool, device: torch.device) -> bool:
    """Return whether any rank was asked to stop. Every rank calls it and gets the same result."""
    flag = torch.tensor([float(requested)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
