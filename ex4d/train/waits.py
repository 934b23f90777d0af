"""Measure how long a step waits for other ranks ("communication"), by timing every collective of DeepSpeed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def waited() -> float:
    """Return the seconds that this process waited in DeepSpeed's collectives since the last call.

    This includes transfers and waiting for the slowest rank. On a GPU it is the time that the main stream was blocked,
    so overlapped communication does not count; synchronize before calling it.
    """
    return _waits.take()


class _Waits:
    """Adds up the time between the call of a collective, or of its handle's `wait`, and its return."""

    def __init__(self) -> None:
        self._seconds, self._inside = 0.0, False
        self._events: list[tuple[Any, Any]] = []

    def take(self) -> float:
        seconds = self._seconds + sum(start.elapsed_time(end) / 1000 for start, end in self._events)
        self._seconds, self._events = 0.0, []
        return seconds

    def timed(self, function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Not timed: a collective called by another one, and work on a side stream, for which nothing waits.
            if self._inside or (on_gpu and torch.cuda.current_stream() != torch.cuda.default_stream()):
                return function(*args, **kwargs)
            self._inside = True
            start = self._now(on_gpu)
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside = False
                end = self._now(on_gpu)
                if on_gpu:
                    self._events.append((start, end))
                else:
                    self._seconds += end - start
            if hasattr(result, "wait"):
                return _Handle(result, self.timed(result.wait, on_gpu))
            return result

        return call

    @staticmethod
    def _now(on_gpu: bool) -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Handle:
    """Handle of an asynchronous collective whose `wait` is timed."""

    def __init__(self, work: Any, wait: Callable[..., Any]):
        self._work, self.wait = work, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "inference_all_reduce", "reduce", "reduce_scatter", "barrier"),
    *("reduce_scatter_tensor", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_base"),
    "all_gather_coalesced",
)
_waits = _Waits()


def time_collectives(backend: Any, on_gpu: bool) -> None:
    """Time the collectives of DeepSpeed's backend, which carries all of its communication."""
    for name in COLLECTIVES:
        function = getattr(backend, name)
        if not hasattr(function, "untimed"):
            clocked = _waits.timed(function, on_gpu)
            clocked.untimed = function  # type: ignore[attr-defined]
            setattr(backend, name, clocked)
