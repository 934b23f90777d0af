"""One child process of `ex4d.isolation`: start it in the sandbox, call it, and find the cause of its death."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ex4d.errors import BadSample
from ex4d.isolation import sandbox
from ex4d.isolation.wire import ProtocolError, pack, receive, send, transmit

log = logging.getLogger(__name__)

_START_LIMIT_S = 120.0  # a cold disk and a busy machine; a healthy child is ready in well under a second
_STDERR_TAIL_BYTES = 2000
# The parent's environment may hold keys and tokens: only these reach a child.
_ENVIRONMENT = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TZ", "PYTHONHASHSEED", "EX4D_CODECS")


@dataclass(frozen=True)
class Limits:
    """The resources that one call may use.

    Args:
        wall_s: seconds of wall time.
        cpu_s: seconds of processor time.
        memory_bytes: address space of the child, libraries included (about 0.5 GB).
        max_calls: a child is replaced after this many calls, so that leaks stay small.
    """

    wall_s: float = 120.0
    cpu_s: float = 120.0
    memory_bytes: int = 6 * 2**30
    max_calls: int = 500


# function, args, limits
Message = tuple[str, tuple[Any, ...], Limits]


class KilledFromOutside(BadSample):
    """The child got a SIGKILL from outside."""


class Child:
    """One child process, which serves calls until it dies or is killed. Raises RuntimeError if it does not start."""

    def __init__(self, limits: Limits, table: str):
        self.memory_bytes, self.num_calls, self.busy = limits.memory_bytes, 0, False
        self.spent = False  # it came near its limit once, so its peak cannot explain a later crash
        # A child's peak memory starts at its parent's, because it is a copy of the parent until it calls exec.
        self.inherited_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ours, theirs = socket.socketpair()
        self.socket = ours
        readable = sandbox.readable_paths(_own_code(table))
        wrapper = sandbox.bubblewrap(readable)
        self.wrapped = bool(wrapper)
        # The death signal follows the *thread* that started the child, so only the main thread may ask for it.
        asks = threading.current_thread() is threading.main_thread() and not wrapper
        child = [str(theirs.fileno()), str(os.getpid() if asks else 0), table]
        with theirs:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-P", "-m", "ex4d.isolation.child", *child],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                start_new_session=True,  # Ctrl-C is the parent's business
            )
        self.stderr = _Tail(self.process.stderr)
        try:
            deadline = time.monotonic() + _START_LIMIT_S
            send(self.socket, [limits.memory_bytes, readable], deadline)
            receive(self.socket, deadline)
        except (TimeoutError, EOFError, ConnectionError, ProtocolError) as error:
            self.kill()
            raise RuntimeError(f"the isolated process did not start: {self.stderr.text()}") from error
        if not self.wrapped:
            _warn(tuple(sandbox.missing()))

    def call(self, message: Message) -> tuple[bool, Any]:
        """Return (True, result) or (False, facts of the exception raised). Raises BadSample if the child is lost."""
        function, args, limits = message
        packed = pack([function, args, [limits.wall_s, limits.cpu_s]])
        self.num_calls += 1
        self.busy = True
        self.stderr.clear()
        deadline = time.monotonic() + limits.wall_s
        try:
            transmit(self.socket, packed, deadline)
            succeeded, value = _checked(receive(self.socket, deadline, self.memory_bytes))
            peak_kb = receive(self.socket, deadline)
            if type(peak_kb) is not int:
                raise ProtocolError("says nothing of its memory")
        except TimeoutError:
            raise BadSample("decode_timeout", f"{function} took more than {limits.wall_s:g} s") from None
        except ProtocolError as error:
            raise BadSample("decode_crash", f"{function} returned an answer that cannot be read") from error
        except (EOFError, ConnectionError):
            raise self._post_mortem(function, limits) from None
        self.busy = False
        self.spent = self._near_limit(peak_kb * 1024) or (not succeeded and value["type"] == "MemoryError")
        if not succeeded and value["type"] == "MemoryError":
            raise BadSample("decode_memory", f"{function} needs more than {self._memory()}")
        return succeeded, value

    def _post_mortem(self, function: str, limits: Limits) -> BadSample:
        if self.wrapped:  # bubblewrap exits just after the child, with its status
            deadline = time.monotonic() + 2
            ended = os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG
            while os.waitid(*ended) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        os.kill(self.process.pid, signal.SIGKILL)  # not Popen.kill, which would collect the exit status
        # wait4 instead of Popen.wait: peak memory distinguishes out-of-memory from other crashes
        _, status, usage = os.wait4(self.process.pid, 0)
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.wrapped and code > 128:  # bubblewrap's exit status for a signal
            code = 128 - code
        if code == -signal.SIGXCPU:
            return BadSample("decode_cpu", f"{function} used more than {limits.cpu_s:g} s of CPU time")
        if code == -signal.SIGALRM:
            return BadSample("decode_timeout", f"{function} took more than {limits.wall_s:g} s")
        tail, peak_bytes = self.stderr.text(), usage.ru_maxrss * 1024
        if self._near_limit(peak_bytes) or "bad_alloc" in tail:
            return BadSample("decode_memory", f"{function} needs more than {self._memory()}")
        if code == -signal.SIGKILL:
            return KilledFromOutside("decode_memory", f"{function} was killed twice by the system")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        # The trace stays out of the message: it has addresses, and messages are part of a dataset's bytes.
        crash = BadSample("decode_crash", f"{function} died of {how}")
        crash.add_note(f"in the isolated process: {tail}")
        return crash

    def _near_limit(self, peak_bytes: int) -> bool:
        """Return whether a memory peak is the child's own and near its limit."""
        return peak_bytes > 1.01 * self.inherited_bytes and peak_bytes > 0.8 * self.memory_bytes

    def _memory(self) -> str:
        return f"{self.memory_bytes / 2**30:.2f} GiB"

    def kill(self) -> None:
        """Kill the process and close its pipes."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        self.socket.close()
        self.stderr.close()


def _checked(answer: Any) -> tuple[bool, Any]:
    """Check an answer: (True, result) or (False, facts of an exception). Raises ProtocolError."""
    if not isinstance(answer, list) or len(answer) != 2 or type(answer[0]) is not bool:
        raise ProtocolError("is no answer to a call")
    succeeded, value = answer
    is_error = isinstance(value, dict) and {"type", "message", "values", "trace"} <= value.keys()
    if not succeeded and not (is_error and isinstance(value["values"], list)):
        raise ProtocolError("has no facts of the exception")
    return succeeded, value


class _Tail:
    """The last bytes of a pipe, which a thread drains: a child that floods it neither blocks nor fills a disk."""

    def __init__(self, pipe: Any):
        self._pipe, self._tail = pipe, b""
        self._thread = threading.Thread(target=self._drain, daemon=True, name="stderr of a child")
        self._thread.start()

    def _drain(self) -> None:
        while data := os.read(self._pipe.fileno(), 1 << 16):
            self._tail = (self._tail + data)[-_STDERR_TAIL_BYTES:]

    def clear(self) -> None:
        self._tail = b""

    def text(self) -> str:
        """Return what a dead child wrote last, on one line."""
        self._thread.join(timeout=2)
        return " ".join(self._tail.decode("utf-8", "replace").split())

    def close(self) -> None:
        """Stop reading; the child must be dead."""
        self._thread.join(timeout=2)
        self._pipe.close()


def _environment() -> dict[str, str]:
    """Return the environment of a child: what `_ENVIRONMENT` allows, one thread per library, and our sys.path."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    path = os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry))
    return {**kept, **single, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1"}


def _own_code(table: str) -> list[str]:
    """Return the folders of our packages, and the file of a table that lies elsewhere."""
    import ex4d

    packages = [Path(ex4d.__path__[0]), Path(ex4d.__path__[0]).with_name("pipelines")]
    file = Path(importlib.import_module(table).__file__ or "")
    return [str(path) for path in (*packages, *([] if any(file.is_relative_to(p) for p in packages) else [file]))]


@cache
def _warn(lacking: tuple[str, ...]) -> None:
    for what in lacking:
        log.warning("decoding is not fully sandboxed on this machine; the kernel lacks %s", what)
