"""Run many small reads or writes in parallel threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yield function(item) of each item, in order, while threads work on the next `num_threads` items.

    `Executor.map` would submit all items at once and keep every result until it is consumed: gigabytes for a million.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(copy_context().run, function, item))
            if len(ahead) > num_threads:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()
