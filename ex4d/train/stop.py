"""Handle requests to stop: a signal may reach any rank at any moment of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def stop_signal(instead: Callable[[], bool] | None = None) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or Ctrl-C arrived; inside the context neither ends the process.

    Args:
        instead: if set, yielded in place of that function: Ray Train runs the loop in a thread, which cannot handle
            signals.
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
    """Return whether any rank was asked to stop. A collective call with the same result on all ranks."""
    flag = torch.tensor([float(requested)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
