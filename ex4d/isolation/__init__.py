"""Process untrusted bytes in a child process, so that a crash, hang, memory leak or exploit does not reach this one.

A worker keeps one child and sends it one call after another; the child is replaced when it dies, breaks a limit, comes
near its memory limit, or has served `max_calls`. Its failures become BadSample, so a bad video costs only its own row.

The child is sandboxed (`ex4d.isolation.sandbox`): no network, no programs, no files except its own libraries and the
inputs that it receives open (`File`), and few environment variables. Its answers are data, never code.
Three independent mechanisms enforce the limits: the parent waits no longer than `wall_s` and then kills the child; the
kernel ends a child that uses up `cpu_s` or outlives its own alarm (even if its parent is gone, or a library hangs while
it holds the interpreter's lock); and the address space is limited to `memory_bytes`.

    limits = Limits(wall_s=60)
    info = run("probe", (File(path),), limits)
"""

from __future__ import annotations

import atexit
import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ex4d import errors
from ex4d.errors import ConfigError
from ex4d.isolation.process import Child, KilledFromOutside, Limits, Message
from ex4d.isolation.wire import File

__all__ = ["File", "Isolated", "Limits", "pooled", "run"]

# The only functions that a child runs: name -> "module:function", imported on first use. A caller that passes `table`
# names a module with its own.
FUNCTIONS: dict[str, str] = {
    "probe": "ex4d.video:probe",
    "frame_pts": "ex4d.video:frame_pts",
    "decode": "ex4d.video:decode",
    "with_audio": "ex4d.video:with_audio",
    "depth_maps": "ex4d.depth.arrays:read",
    "depth_picture": "ex4d.depth.pictures:picture",
}
TABLE = "ex4d.isolation"

_MAX_TEXT = 20_000  # characters of a child's message or traceback
_BUILTIN_ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, OSError, FileNotFoundError)}


def run(function: str, args: Sequence[Any] = (), limits: Limits | None = None, table: str = TABLE) -> Any:
    """Call the named function in this process's child, and return its result. See `Isolated.call`."""
    limits = limits or Limits()
    return pooled(limits, table).call(function, *args, limits=limits)


_POOL: dict[tuple[int, int, int, str], Isolated] = {}
_POOL_LOCK = threading.Lock()


def pooled(limits: Limits, table: str = TABLE) -> Isolated:
    """Return this process's Isolated for limits of memory and calls, whatever the time limits; a fork gets its own."""
    with _POOL_LOCK:
        key = (os.getpid(), limits.memory_bytes, limits.max_calls, table)
        return _POOL.setdefault(key, Isolated(limits, table))


class Isolated:
    """One child process, started at the first call and replaced when it dies. Threads take turns.

    Args:
        limits: of each call; a call may have other time limits.
        table: name of a module with FUNCTIONS like this one's.
    """

    def __init__(self, limits: Limits, table: str = TABLE):
        self.limits, self.table = limits, table
        self._lock = threading.Lock()
        self._child: Child | None = None

    def call(self, function: str, *args: Any, limits: Limits | None = None) -> Any:
        """Compute `function(*args)` in the child, within wall_s and cpu_s of `limits`, by default `self.limits`.

        Raises:
            BadSample: `decode_timeout`, `decode_cpu`, `decode_memory`, `decode_crash`.
            ConfigError: the name is not in the table.
            Ex4dError, ValueError, TypeError, OSError: what the function raised, with the child's traceback as a note;
                RuntimeError for other types.
        """
        message = (function, args, limits or self.limits)
        if function not in importlib.import_module(self.table).FUNCTIONS:
            raise ConfigError("function", function, f"not in the table of {self.table}")
        with self._lock:
            try:
                succeeded, value = self._call(message)
            except KilledFromOutside:
                # Killed by the out-of-memory killer or an operator, perhaps another process's fault: retry once.
                succeeded, value = self._call(message)
        if succeeded:
            return value
        raise _error_of(value)

    def _call(self, message: Message) -> tuple[bool, Any]:
        child = self._child
        if child is not None and (
            child.spent or child.num_calls >= self.limits.max_calls or child.process.poll() is not None
        ):
            self.close()
        if self._child is None:
            self._child = Child(self.limits, self.table)
        try:
            return self._child.call(message)
        except BaseException:  # also for KeyboardInterrupt: this call's answer must not reach the next call
            if self._child.busy:
                self.close()
            raise

    def close(self) -> None:
        """Kill the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()


def _error_of(facts: Mapping[str, Any]) -> Exception:
    """Rebuild the exception that a child's function raised; its message is plain text of limited length."""
    kind, text = str(facts["type"]), str(facts["message"])[:_MAX_TEXT]
    values = [value if isinstance(value, int | float) else str(value)[:_MAX_TEXT] for value in facts["values"]]
    ours = {name: getattr(errors, name) for name in ("BadSample", "ContractError", "ConfigError", "Filtered")}
    error: Exception
    try:
        error = {**_BUILTIN_ERRORS, **ours}[kind](*values)
    except (KeyError, TypeError):  # another type, or values that do not fit it
        error = RuntimeError(f"{kind[:80]}: {text}")
    error.add_note(f"in the isolated process:\n{str(facts['trace'])[:_MAX_TEXT]}")
    return error


@atexit.register
def _close_all() -> None:
    for (pid, *_), isolated in _POOL.items():
        if pid == os.getpid():
            isolated.close()
