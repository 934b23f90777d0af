"""The child of `ex4d.isolation`: answer calls until the parent hangs up or kills it."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import io
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ex4d.isolation import sandbox
from ex4d.isolation.wire import receive, send

GRACE_S = 5.0  # the child's own alarm fires this long after the parent's time limit
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_TRACE = 20_000  # characters


def serve(sock: socket.socket, table: str) -> None:
    """Answer calls until the other side closes the socket: the child's main loop."""
    memory_bytes, readable = receive(sock)
    functions = importlib.import_module(table).FUNCTIONS
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sandbox.enter(readable)
    send(sock, "ready")
    while True:
        try:
            function, args, (wall_s, cpu_limit_s) = receive(sock, files=True)
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = int(used.ru_utime + used.ru_stime + cpu_limit_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        signal.setitimer(signal.ITIMER_REAL, wall_s + GRACE_S)
        answer = _answer(functions[function], args)
        for value in args:
            if isinstance(value, io.BufferedReader):
                value.close()
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            send(sock, answer)
        except TypeError as error:  # nothing was sent yet
            send(sock, [False, _facts(error)])
        send(sock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # last: packing an answer also takes memory


def _answer(name: str, args: Sequence[Any]) -> list[Any]:
    module, _, function = name.partition(":")
    try:
        return [True, getattr(importlib.import_module(module), function)(*args)]
    except Exception as error:  # noqa: BLE001 (it crosses to the caller, who decides)
        return [False, _facts(error)]


def _facts(error: Exception) -> dict[str, Any]:
    values = (error.key, error.value, error.allowed) if type(error).__name__ == "ConfigError" else error.args  # type: ignore[attr-defined]
    return {
        "type": type(error).__name__,
        "message": str(error),
        "values": [value if isinstance(value, int | float) else str(value) for value in values],
        "trace": "".join(traceback.format_exception(error))[-_MAX_TRACE:],
    }


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends; 0: do not ask."""
    if parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)


if __name__ == "__main__":
    _fd, _parent, _table = sys.argv[1:]
    die_with(int(_parent))
    faulthandler.enable()
    with socket.socket(fileno=int(_fd)) as _sock:
        serve(_sock, _table)
