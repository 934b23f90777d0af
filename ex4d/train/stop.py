"""Being asked to stop: by a signal, at any rank, at any moment of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def stop_signal(instead: Callable[[], bool] | None = None) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM or Ctrl-C has come; neither ends the process while this is open.

    Args:
        instead: says it already, and is yielded: Ray Train runs the loop in a thread, where signals cannot be taken.
    """
    if instead is not None:
        yield instead
        return
    asked = threading.Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(asked: bool, device: torch.device) -> bool:
    """Return whether any rank was asked to stop. Every rank calls, and gets the same answer."""
    flag = torch.tensor([float(asked)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
