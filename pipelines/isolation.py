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
import ctypes
import faulthandler
import importlib
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ex4d.errors import BadSample, ConfigError

# What a child will run, and nothing else: name -> "module:function", imported on first use. Tests bring their own.
FUNCTIONS: dict[str, str] = {
    "probe": "ex4d.video:probe",
    "frame_pts": "ex4d.video:frame_pts",
    "decode": "ex4d.video:decode",
}
TABLE = "pipelines.isolation"

_START_LIMIT_S = 120.0  # a cold disk and a busy machine; a healthy child is ready in well under a second
_GRACE_S = 5.0  # the child's own alarm comes after the parent's patience has ended
_STDERR_TAIL_BYTES = 2000
_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
    """Return what the named function returns, from this process's child for these limits. See `Isolated.call`."""
    return pooled(limits or Limits(), table).call(function, *args)


_POOL: dict[tuple[int, Limits, str], Isolated] = {}
_POOL_LOCK = threading.Lock()


def pooled(limits: Limits, table: str = TABLE) -> Isolated:
    """Return this process's Isolated for these limits; a forked process gets its own."""
    with _POOL_LOCK:
        return _POOL.setdefault((os.getpid(), limits, table), Isolated(limits, table))


class Isolated:
    """One child process, started at the first call and replaced when it dies. Threads take turns.

    Args:
        limits: hold for each call by itself.
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
        if function not in importlib.import_module(self.table).FUNCTIONS:
            raise ConfigError("function", function, f"not in the table of {self.table}")
        with self._lock:
            try:
                succeeded, value = self._call(function, args, kwargs)
            except _KilledFromOutside:
                # The system's out-of-memory killer or an operator: once may be a neighbour's fault, twice is not.
                succeeded, value = self._call(function, args, kwargs)
        if succeeded:
            return value
        raise value

    def _call(self, function: str, args: tuple, kwargs: dict) -> tuple[bool, Any]:
        if self._child is not None and (self._child.num_calls >= self.limits.max_calls or not self._child.alive()):
            self.close()
        if self._child is None:
            self._child = _Child(self.limits, self.table)
        try:
            return self._child.call(function, args, kwargs)
        except BaseException:  # also KeyboardInterrupt: the answer to this call must not reach the next one
            self.close()
            raise

    def close(self) -> None:
        """Kill the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()


class _KilledFromOutside(BadSample):
    """The child got a SIGKILL that was not ours."""


class _Child:
    def __init__(self, limits: Limits, table: str):
        self.limits, self.num_calls = limits, 0
        # A child's peak memory starts at its parent's, since it is the parent until it becomes another program.
        self.inherited_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.stderr = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115 (append: it is cut while the child writes)
        ours, theirs = socket.socketpair()
        self.socket = ours
        # The death signal follows the *thread* that started the child, so only the main thread may ask for it.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        command = [sys.executable, "-m", "pipelines.isolation", str(theirs.fileno()), str(parent), table]
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
            _send(self.socket, limits, deadline)
            _receive(self.socket, deadline)
        except (TimeoutError, EOFError, ConnectionError) as error:
            message = f"the isolated process did not start: {self._stderr_tail()}"
            self.kill()
            raise RuntimeError(message) from error

    def alive(self) -> bool:
        return self.process.poll() is None

    def call(self, function: str, args: tuple, kwargs: dict) -> tuple[bool, Any]:
        """Return (True, result) or (False, the exception that it raised). Raises BadSample when the child is lost."""
        self.num_calls += 1
        self.stderr.truncate(0)
        deadline = time.monotonic() + self.limits.wall_s
        try:
            _send(self.socket, (function, args, kwargs), deadline)
            succeeded, value = _receive(self.socket, deadline)
        except TimeoutError:
            raise BadSample("decode_timeout", f"{function} took more than {self.limits.wall_s:g} s") from None
        except (EOFError, ConnectionError):
            raise self._post_mortem(function) from None
        if isinstance(value, MemoryError):
            raise BadSample("decode_memory", f"{function} needs more than {self._memory()}")
        return succeeded, value

    def _post_mortem(self, function: str) -> BadSample:
        os.kill(self.process.pid, signal.SIGKILL)  # not Popen.kill, which would collect the exit status
        # wait4 instead of Popen.wait: the peak memory tells running out of it from other crashes
        _, status, usage = os.wait4(self.process.pid, 0)
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            return BadSample("decode_cpu", f"{function} used more than {self.limits.cpu_s:g} s of processor time")
        if code == -signal.SIGALRM:
            return BadSample("decode_timeout", f"{function} took more than {self.limits.wall_s:g} s")
        tail, peak_bytes = self._stderr_tail(), usage.ru_maxrss * 1024
        its_own = peak_bytes > 1.01 * self.inherited_bytes
        if (its_own and peak_bytes > 0.8 * self.limits.memory_bytes) or "bad_alloc" in tail:
            return BadSample("decode_memory", f"{function} needs more than {self._memory()}")
        if code == -signal.SIGKILL:
            return _KilledFromOutside("decode_memory", f"{function} was killed twice by the system")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        # The trace stays out of the message: it has addresses, and messages are part of a dataset's bytes.
        crash = BadSample("decode_crash", f"{function} died of {how}")
        crash.add_note(f"in the isolated process: {tail}")
        return crash

    def _memory(self) -> str:
        return f"{self.limits.memory_bytes / 2**30:.2f} GiB"

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


def _send(sock: socket.socket, message: Any, deadline: float | None = None) -> None:
    """Send one message: the lengths, the pickle, then each array's bytes as they lie in memory."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    header = b"".join(_LENGTH.pack(number) for number in (len(parts), *(part.nbytes for part in parts)))
    for part in (memoryview(header), *parts):
        while part.nbytes:
            sock.settimeout(_remaining(deadline))
            part = part[sock.send(part[: 1 << 20]) :]


def _receive(sock: socket.socket, deadline: float | None = None) -> Any:
    """Return one message. Raises EOFError when the other side is gone, TimeoutError at the deadline."""
    (count,) = _LENGTH.unpack(_read(sock, _LENGTH.size, deadline))
    lengths = [_LENGTH.unpack(_read(sock, _LENGTH.size, deadline))[0] for _ in range(count)]
    body, *buffers = [_read(sock, length, deadline) for length in lengths]
    # The other side is our own code with our own rights, not a file: a pickle gives it nothing that it has not got.
    return pickle.loads(body, buffers=buffers)  # noqa: S301


def _read(sock: socket.socket, length: int, deadline: float | None) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view.nbytes:
        sock.settimeout(_remaining(deadline))
        received = sock.recv_into(view)
        if received == 0:
            raise EOFError
        view = view[received:]
    return data


def _remaining(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _serve(sock: socket.socket, table: str) -> None:
    """Answer calls until the other side closes: the child's main loop."""
    limits: Limits = _receive(sock)
    functions = importlib.import_module(table).FUNCTIONS
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(sock, "ready")
    while True:
        try:
            function, args, kwargs = _receive(sock)
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = int(used.ru_utime + used.ru_stime + limits.cpu_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        signal.setitimer(signal.ITIMER_REAL, limits.wall_s + _GRACE_S)
        answer = _answer(functions[function], args, kwargs)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(sock, answer)


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


def _die_with(parent: int) -> None:
    if parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


@atexit.register
def _close_all() -> None:
    for (pid, *_), isolated in _POOL.items():
        if pid == os.getpid():
            isolated.close()


if __name__ == "__main__":
    _fd, _parent, _table = sys.argv[1:]
    _die_with(int(_parent))
    faulthandler.enable()
    with socket.socket(fileno=int(_fd)) as _sock:
        _serve(_sock, _table)
