"""Run another program as if on an older kernel: `python old_kernel.py landlock,seccomp PROGRAM …`.

A seccomp filter of its own answers as such a kernel does: ENOSYS for Landlock's system calls, EINVAL for a filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

LOAD, EQUAL, RETURN, ALLOW, FAIL_WITH = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
LANDLOCK = (444, 445, 446)
PRCTL, SECCOMP = {"x86_64": (157, 317), "aarch64": (167, 277)}.get(platform.machine(), (0, 0))
SET_SECCOMP, SET_NO_NEW_PRIVS = 22, 38


def program(lacking: set[str]) -> bytes:
    """Return the filter in BPF."""
    steps = [(LOAD, 0, 0, 0)]
    if "landlock" in lacking:
        for number in LANDLOCK:
            steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL_WITH | errno.ENOSYS)]
    if "seccomp" in lacking:
        steps += [(EQUAL, 0, 1, SECCOMP), (RETURN, 0, 0, FAIL_WITH | errno.ENOSYS)]
        steps += [(EQUAL, 0, 3, PRCTL), (LOAD, 0, 0, 16), (EQUAL, 0, 1, SET_SECCOMP)]
        steps.append((RETURN, 0, 0, FAIL_WITH | errno.EINVAL))
    steps.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    code = program(set(sys.argv[1].split(",")))
    held = ctypes.create_string_buffer(code)
    assert libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    loaded = libc.prctl(SET_SECCOMP, 2, struct.pack("@HP", len(code) // 8, ctypes.addressof(held)), 0, 0)
    assert loaded == 0, os.strerror(ctypes.get_errno())
    os.execvp(sys.argv[2], sys.argv[2:])
