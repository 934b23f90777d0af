"""The child of `pipelines.runtime.isolation`: answer calls until the parent hangs up or kills it."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from typing import Any

from pipelines.runtime.wire import receive, send

GRACE_S = 5.0  # the child's own alarm comes after the parent's patience has ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve(sock: socket.socket, table: str) -> None:
    """Answer calls until the other side closes: the child's main loop."""
    memory_bytes: int = receive(sock)
    functions = importlib.import_module(table).FUNCTIONS
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    send(sock, "ready")
    while True:
        try:
            function, args, kwargs, limits = receive(sock)
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = int(used.ru_utime + used.ru_stime + limits.cpu_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        signal.setitimer(signal.ITIMER_REAL, limits.wall_s + GRACE_S)
        answer = _answer(functions[function], args, kwargs)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(sock, answer)


def _answer(name: str, args: tuple, kwargs: dict) -> tuple[bool, Any]:
    module, _, function = name.partition(":")
    try:
        return True, getattr(importlib.import_module(module), function)(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 (it crosses to the caller, who decides)
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes: does it survive the way?)
        except (pickle.PicklingError, TypeError, AttributeError):
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.__traceback__ = error.__cause__ = error.__context__ = None
        error.add_note(f"in the isolated process:\n{text}")
        return False, error


def die_with(parent: int) -> None:
    if parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


if __name__ == "__main__":
    _fd, _parent, _table = sys.argv[1:]
    die_with(int(_parent))
    faulthandler.enable()
    with socket.socket(fileno=int(_fd)) as _sock:
        serve(_sock, _table)
