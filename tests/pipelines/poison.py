"""Functions that misbehave on purpose, to test isolation. Run them only in a child process."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Any

import numpy as np

from ex4d.errors import BadSample

HELD: list[Any] = []


def echo(*args: Any) -> Any:
    return args


def pid() -> int:
    return os.getpid()


def segfault() -> None:
    ctypes.string_at(0)


def hang() -> None:
    time.sleep(3600)


def nap() -> str:
    time.sleep(1.5)
    return "alive"


def hang_with_gil() -> None:
    """Sleep in C without releasing the interpreter lock, like a deadlocked decoder."""
    ctypes.PyDLL(None).sleep(3600)


def spin() -> None:
    while True:
        pass


def eat_memory() -> None:
    while True:
        HELD.append(np.ones(8 * 2**20))


def exit_quietly() -> None:
    os._exit(3)


def raise_bad_sample() -> None:
    raise BadSample("no_frames", "told to")


def raise_unpicklable() -> None:
    error = ValueError("holds a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def frames(num_frames: int, height: int, width: int) -> np.ndarray:
    return np.arange(num_frames * height * width * 3, dtype=np.uint32).astype(np.uint8).reshape(-1, height, width, 3)


def read_stdin() -> bytes:
    return os.read(0, 10)


def chatter() -> str:
    print("to stdout")
    os.write(2, b"to stderr " * 100_000)
    return "done"


_ALL = (echo, pid, nap, segfault, hang, hang_with_gil, spin, eat_memory, exit_quietly, frames, read_stdin, chatter)
FUNCTIONS = {f.__name__: f"{__name__}:{f.__name__}" for f in (*_ALL, raise_bad_sample, raise_unpicklable)}
