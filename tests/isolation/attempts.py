"""Attacks that someone who controls a decoder would try. Each runs in the real child and returns its outcome."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import socket
import sys
import threading
from collections.abc import Callable
from typing import IO

NUMBER = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 0)


def tried(action: Callable[[], object]) -> str:
    """Return the name of the error that stopped an action, or "succeeded"."""
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except (RuntimeError, ValueError):  # a thread that cannot be started, a limit that cannot be raised
        return "EPERM"
    return "succeeded"


def system_call(number: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")


def write(path: str) -> None:
    with open(path, "w") as file:
        file.write("x")


def connect(kind: int, address: object) -> None:
    with socket.socket(kind, socket.SOCK_STREAM) as sock:
        sock.connect(address)


def overwrite(file: IO[bytes]) -> None:
    os.write(file.fileno(), b"x")


def everything(file: IO[bytes], secret: str, folder: str, port: int, unix: str) -> dict[str, str]:
    """Return {attempt: outcome}."""
    parent = os.getppid()
    buffer = ctypes.create_string_buffer(4096)
    start = threading.Thread(target=lambda: None).start
    attempts: dict[str, Callable[[], object]] = {
        "write a file": lambda: write(os.path.join(folder, "new")),
        "write over a file": lambda: write(secret),
        "write the input": lambda: overwrite(file),
        "open the input by its descriptor for writing": lambda: os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR),
        "read a secret": lambda: read(secret),
        "list a folder": lambda: os.listdir(folder),
        "list the root": lambda: os.listdir("/"),
        "read the users": lambda: read("/etc/passwd"),
        "read the parent's environment": lambda: read(f"/proc/{parent}/environ"),
        "read the parent's memory": lambda: read(f"/proc/{parent}/mem"),
        "delete": lambda: os.unlink(secret),
        "rename": lambda: os.rename(secret, secret + "2"),
        "make a folder": lambda: os.mkdir(os.path.join(folder, "d")),
        "make a link": lambda: os.symlink(secret, os.path.join(folder, "l")),
        "make a hard link": lambda: os.link(secret, os.path.join(folder, "h")),
        "make a pipe": lambda: os.mkfifo(os.path.join(folder, "p")),
        "change rights": lambda: os.chmod(secret, 0o777),
        "change times": lambda: os.utime(secret),
        "change rights by setxattrat": lambda: system_call(463, -100, secret.encode(), 0, b"user.a", buffer, 16),
        "remove rights by removexattrat": lambda: system_call(466, -100, secret.encode(), 0, b"user.a"),
        "change the input's flags": lambda: fcntl.ioctl(file.fileno(), 0x40086602, bytes(8)),
        "move the parent to one core": lambda: os.sched_setaffinity(parent, {0}),
        "truncate": lambda: os.truncate(secret, 0),
        "connect by TCP": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
        "connect to a local socket": lambda: connect(socket.AF_UNIX, unix),
        "connect to an abstract socket": lambda: connect(socket.AF_UNIX, "\0ex4d"),
        "make a pair of sockets": socket.socketpair,
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "run a program in a child": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "fork": os.fork,
        "start a thread": start,
        "trace the parent": lambda: system_call((101, 117)[NUMBER], 16, parent, 0, 0),
        "read the parent by process_vm_readv": lambda: system_call(
            (310, 270)[NUMBER], parent, ctypes.byref(buffer), 1, ctypes.byref(buffer), 1, 0
        ),
        "ask whether the parent lives": lambda: os.kill(parent, 0),
        "kill the parent": lambda: os.kill(parent, 9),
        "kill the parent's thread": lambda: system_call((234, 131)[NUMBER], parent, parent, 9),
        "kill everyone": lambda: os.kill(-1, 9),
        "open the parent by pidfd": lambda: os.pidfd_open(parent),
        "set the parent's limits": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE, (1, 1)),
        "raise its own limits": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
        "io_uring": lambda: system_call(425, 1, buffer),
        "bpf": lambda: system_call((321, 280)[NUMBER], 0, buffer, 64),
        "memfd": lambda: os.memfd_create("x"),
        "a new namespace": lambda: system_call((272, 97)[NUMBER], 0x10000000),
        "become root": lambda: os.setuid(0),
        "a new filter": lambda: system_call((317, 277)[NUMBER], 1, 0, buffer),
        "shared memory": lambda: system_call((29, 194)[NUMBER], 4711, 4096, 0o1666),
    }
    return {name: tried(action) for name, action in attempts.items()}


def milder(file: IO[bytes], secret: str, folder: str, port: int) -> dict[str, str]:
    """Return {attempt: outcome} of attempts that do no harm if they succeed."""
    input_path = f"/proc/self/fd/{file.fileno()}"
    attempts: dict[str, Callable[[], object]] = {
        "read a secret": lambda: read(secret),
        "write a file": lambda: write(os.path.join(folder, "new")),
        "write over a file": lambda: write(secret),
        "open the input for writing": lambda: os.open(input_path, os.O_RDWR),
        "open by openat2": lambda: system_call(437, -100, secret.encode(), (ctypes.c_uint64 * 3)(1, 0, 0), 24),
        "truncate the input": lambda: os.truncate(input_path, 0),
        "delete": lambda: os.unlink(secret),
        "rename": lambda: os.rename(secret, secret + "2"),
        "make a folder": lambda: os.mkdir(os.path.join(folder, "d")),
        "make a link": lambda: os.symlink(secret, os.path.join(folder, "l")),
        "send by UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port)),
    }
    return {name: tried(action) for name, action in attempts.items()}


def facts() -> dict[str, object]:
    """Return the remaining abilities of this process, and everything that it was passed."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    kinds = ("RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_CORE")
    return {
        "environment": dict(os.environ),
        "arguments": sys.argv,
        "limits": {kind: resource.getrlimit(getattr(resource, kind))[1] for kind in kinds},
        "capabilities": sum(sets),
        "dumpable": libc.prctl(3, 0, 0, 0, 0),
        "no_new_privs": libc.prctl(39, 0, 0, 0, 0),
        "uid": os.getuid(),
    }


def other_numbers() -> None:
    """Make a system call with x32's numbers, which a filter for x86-64 does not list."""
    system_call(0x40000000 + 41, 2, 1, 0)


def abort() -> None:
    os.abort()


def hold(num_bytes: int) -> int:
    """Allocate and fill that much memory, then free it."""
    return len(bytearray(os.urandom(1)) * num_bytes)


def strided(num_bytes: int) -> object:
    """Return a strided array of that many bytes, which must be copied to be sent."""
    import numpy as np

    return np.ones((num_bytes // 2, 2), np.uint8)[:, ::-1]


def contents(file: IO[bytes]) -> bytes:
    return file.read()


class Secret:
    """A class that the protocol does not allow."""


def foreign_class() -> object:
    return Secret()


FUNCTIONS = {
    f.__name__: f"{__name__}:{f.__name__}"
    for f in (everything, milder, facts, other_numbers, abort, hold, strided, contents, foreign_class, read)
}
