"""Work that may crash, hang or eat memory runs in a child process that can be killed without hurting anyone else.

A worker keeps one child and sends it one call after another; the child is replaced when it dies, breaks a limit, or
has served `max_calls`. What goes wrong in it comes back as BadSample, so one video costs one row.

The limits are kept by three independent means: the parent waits no longer than `wall_s` and then kills; the kernel
ends a child that burns `cpu_s` or outlives its own alarm (also when its parent is gone, and also when a library hangs
with the interpreter's lock held); and the address space ends at `memory_bytes`.

    limits = Limits(wall_s=60)
    info = run("probe", (path,), limits)
"""

from __future__ import annotations

import atexit
import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ex4d.errors import BadSample, ConfigError
from pipelines.runtime.wire import receive, send

# What a child will run, and nothing else: name -> "module:function", imported on first use. Tests bring their own.
FUNCTIONS: dict[str, str] = {
    "probe": "ex4d.video:probe",
    "frame_pts": "ex4d.video:frame_pts",
    "decode": "ex4d.video:decode",
}
TABLE = "pipelines.runtime.isolation"

_START_LIMIT_S = 120.0  # a cold disk and a busy machine; a healthy child is ready in well under a second
_STDERR_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Limits:
    """What one call may use.

    Args:
        wall_s: seconds on the clock.
        cpu_s: seconds of processor time.
        memory_bytes: address space of the child, libraries included (about 0.5 GB).
        max_calls: a child is replaced after so many calls, so that leaks stay small.
    """

    wall_s: float = 120.0
    cpu_s: float = 120.0
    memory_bytes: int = 6 * 2**30
    max_calls: int = 500


def run(function: str, args: Sequence[Any] = (), limits: Limits | None = None, table: str = TABLE) -> Any:
    """Return what the named function returns, from this process's child. See `Isolated.call`."""
    limits = limits or Limits()
    return pooled(limits, table).call_within(limits, function, args)


_POOL: dict[tuple[int, int, int, str], Isolated] = {}
_POOL_LOCK = threading.Lock()


def pooled(limits: Limits, table: str = TABLE) -> Isolated:
    """Return this process's Isolated for a memory limit, whatever the time limits; a forked process gets its own."""
    with _POOL_LOCK:
        key = (os.getpid(), limits.memory_bytes, limits.max_calls, table)
        return _POOL.setdefault(key, Isolated(limits, table))


class Isolated:
    """One child process, started at the first call and replaced when it dies. Threads take turns.

    Args:
        limits: hold for each call by itself; a call may be given other times.
        table: name of a module with FUNCTIONS like this one's.
    """

    def __init__(self, limits: Limits, table: str = TABLE):
        self.limits, self.table = limits, table
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Return `function(*args, **kwargs)`, computed in the child.

        Raises:
            BadSample: `decode_timeout`, `decode_cpu`, `decode_memory`, `decode_crash`.
            ConfigError: the name is not in the table.
            Exception: whatever the function raised, with the child's traceback as a note.
        """
        return self.call_within(self.limits, function, args, kwargs)

    def call_within(
        self, limits: Limits, function: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return what `call` returns, within the wall_s and cpu_s of other limits."""
        message = (function, tuple(args), dict(kwargs or {}), limits)
        if function not in importlib.import_module(self.table).FUNCTIONS:
            raise ConfigError("function", function, f"not in the table of {self.table}")
        with self._lock:
            try:
                succeeded, value = self._call(message)
            except _KilledFromOutside:
                # The system's out-of-memory killer or an operator: once may be a neighbour's fault, twice is not.
                succeeded, value = self._call(message)
        if succeeded:
            return value
        raise value

    def _call(self, message: Message) -> tuple[bool, Any]:
        if self._child is not None and (self._child.num_calls >= self.limits.max_calls or not self._child.alive()):
            self.close()
        if self._child is None:
            self._child = _Child(self.limits, self.table)
        try:
            return self._child.call(message)
        except BaseException:  # also KeyboardInterrupt: the answer to this call must not reach the next one
            self.close()
            raise

    def close(self) -> None:
        """Kill the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()


# function, args, kwargs, limits
Message = tuple[str, tuple[Any, ...], dict[str, Any], Limits]


class _KilledFromOutside(BadSample):
    """The child got a SIGKILL that was not ours."""


class _Child:
    def __init__(self, limits: Limits, table: str):
        self.memory_bytes, self.num_calls = limits.memory_bytes, 0
        # A child's peak memory starts at its parent's, since it is the parent until it becomes another program.
        self.inherited_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.stderr = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115 (append: it is cut while the child writes)
        ours, theirs = socket.socketpair()
        self.socket = ours
        # The death signal follows the *thread* that started the child, so only the main thread may ask for it.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        command = [sys.executable, "-m", "pipelines.runtime.isolation_child", str(theirs.fileno()), str(parent), table]
        single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.stderr,
                pass_fds=(theirs.fileno(),),
                env=os.environ | single | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "2"},
                start_new_session=True,  # Ctrl-C is the parent's business
            )
        try:
            deadline = time.monotonic() + _START_LIMIT_S
            send(self.socket, limits.memory_bytes, deadline)
            receive(self.socket, deadline)
        except (TimeoutError, EOFError, ConnectionError) as error:
            message = f"the isolated process did not start: {self._stderr_tail()}"
            self.kill()
            raise RuntimeError(message) from error

    def alive(self) -> bool:
        return self.process.poll() is None

    def call(self, message: Message) -> tuple[bool, Any]:
        """Return (True, result) or (False, the exception that it raised). Raises BadSample when the child is lost."""
        function, *_, limits = message
        self.num_calls += 1
        self.stderr.truncate(0)
        deadline = time.monotonic() + limits.wall_s
        try:
            send(self.socket, message, deadline)
            succeeded, value = receive(self.socket, deadline)
        except TimeoutError:
            raise BadSample("decode_timeout", f"{function} took more than {limits.wall_s:g} s") from None
        except (EOFError, ConnectionError):
            raise self._post_mortem(function, limits) from None
        if isinstance(value, MemoryError):
            raise BadSample("decode_memory", f"{function} needs more than {self._memory()}")
        return succeeded, value

    def _post_mortem(self, function: str, limits: Limits) -> BadSample:
        os.kill(self.process.pid, signal.SIGKILL)  # not Popen.kill, which would collect the exit status
        # wait4 instead of Popen.wait: the peak memory tells running out of it from other crashes
        _, status, usage = os.wait4(self.process.pid, 0)
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            return BadSample("decode_cpu", f"{function} used more than {limits.cpu_s:g} s of processor time")
        if code == -signal.SIGALRM:
            return BadSample("decode_timeout", f"{function} took more than {limits.wall_s:g} s")
        tail, peak_bytes = self._stderr_tail(), usage.ru_maxrss * 1024
        its_own = peak_bytes > 1.01 * self.inherited_bytes
        if (its_own and peak_bytes > 0.8 * self.memory_bytes) or "bad_alloc" in tail:
            return BadSample("decode_memory", f"{function} needs more than {self._memory()}")
        if code == -signal.SIGKILL:
            return _KilledFromOutside("decode_memory", f"{function} was killed twice by the system")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        # The trace stays out of the message: it has addresses, and messages are part of a dataset's bytes.
        crash = BadSample("decode_crash", f"{function} died of {how}")
        crash.add_note(f"in the isolated process: {tail}")
        return crash

    def _memory(self) -> str:
        return f"{self.memory_bytes / 2**30:.2f} GiB"

    def _stderr_tail(self) -> str:
        size = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, size - _STDERR_TAIL_BYTES))
        return " ".join(self.stderr.read().decode("utf-8", "replace").split())

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        self.socket.close()
        self.stderr.close()


@atexit.register
def _close_all() -> None:
    for (pid, *_), isolated in _POOL.items():
        if pid == os.getpid():
            isolated.close()
