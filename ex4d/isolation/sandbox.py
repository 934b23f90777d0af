"""Drop the rights of the current process for good; a decoding child does this before it reads untrusted bytes.

No privilege and no package is needed. Landlock (Linux 5.13) leaves only read access to the interpreter and its
libraries and, from Linux 6.7, blocks TCP; a seccomp filter refuses system calls that reach other processes, the network
or the kernel; capabilities are dropped, and resources are limited. Inputs arrive as open files, so their paths need not
stay readable.

Sources: landlock(7), seccomp(2), linux/landlock.h, linux/seccomp.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

# name, number on x86_64, number on aarch64 ("-": the architecture has none). Refused with EPERM.
_REFUSED = """
socket 41 198|socketpair 53 199|bind 49 200|listen 50 201|accept 43 202|connect 42 203|accept4 288 242
fork 57 -|vfork 58 -|clone 56 220|execve 59 221|execveat 322 281|ptrace 101 117|process_vm_readv 310 270
process_vm_writev 311 271|process_madvise 440 440|process_mrelease 448 448|kcmp 312 272|pidfd_open 434 434
pidfd_getfd 438 438|pidfd_send_signal 424 424|rt_sigqueueinfo 129 138|rt_tgsigqueueinfo 297 240|tkill 200 130
io_uring_setup 425 425|io_uring_enter 426 426|io_uring_register 427 427|bpf 321 280|perf_event_open 298 241
userfaultfd 323 282|seccomp 317 277|memfd_create 319 279|memfd_secret 447 447|personality 135 92
shmget 29 194|shmat 30 196|shmctl 31 195|semget 64 190|semop 65 193|semctl 66 191|semtimedop 220 192
msgget 68 186|msgsnd 69 189|msgrcv 70 188|msgctl 71 187|mq_open 240 180|mq_unlink 241 181
add_key 248 217|request_key 249 218|keyctl 250 219|unshare 272 97|setns 308 268|chroot 161 51|pivot_root 155 41
mount 165 40|umount2 166 39|open_tree 428 428|move_mount 429 429|fsopen 430 430|fsconfig 431 431|fsmount 432 432
fspick 433 433|mount_setattr 442 442|name_to_handle_at 303 264|open_by_handle_at 304 265
chmod 90 -|fchmod 91 52|fchmodat 268 53|fchmodat2 452 452|chown 92 -|lchown 94 -|fchown 93 55|fchownat 260 54
utime 132 -|utimes 235 -|futimesat 261 -|utimensat 280 88|mknod 133 -|mknodat 259 33
setxattr 188 5|lsetxattr 189 6|fsetxattr 190 7|removexattr 197 14|lremovexattr 198 15|fremovexattr 199 16
inotify_init 253 -|inotify_init1 294 26|fanotify_init 300 262|quotactl 179 60|acct 163 89|swapon 167 224
swapoff 168 225|reboot 169 142|sethostname 170 161|setdomainname 171 162|settimeofday 164 170|clock_adjtime 305 266
init_module 175 105|finit_module 313 273|delete_module 176 106|kexec_load 246 104|kexec_file_load 320 294
setuid 105 146|setgid 106 144|setreuid 113 145|setregid 114 143|setresuid 117 147|setresgid 119 149|setgroups 116 159
creat 85 -|truncate 76 45|ftruncate 77 46|fallocate 285 47|unlink 87 -|unlinkat 263 35|rename 82 -|renameat 264 38
renameat2 316 276|mkdir 83 -|mkdirat 258 34|rmdir 84 -|symlink 88 -|symlinkat 266 36|link 86 -|linkat 265 37
setpgid 109 154|setsid 112 157|capset 126 91|setpriority 141 140|sched_setparam 142 118|sched_setscheduler 144 119
sched_setattr 314 274|ioprio_set 251 30|migrate_pages 256 238|move_pages 279 239|iopl 172 -|ioperm 173 -
"""
# Refused with ENOSYS, so that the C library falls back to `clone` and `openat`, which can be checked.
_UNKNOWN = {"clone3": (435, 435), "openat2": (437, 437)}
# Opening a file for writing is refused, even without Landlock: {call: (its numbers, offset of its flags)}
_OPENING = {"open": ((2, -1), 24), "openat": ((257, 56), 32)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_KILL, _TGKILL, _PRLIMIT = (62, 129), (234, 131), (302, 261)  # allowed on oneself, so that abort() works
_AFFINITY = (203, 122)  # sched_setaffinity, allowed on the caller
# ioctl can change the flags of a file that is open for reading. Allowed: about terminals and non-blocking descriptors.
_IOCTL, _IOCTLS = (16, 29), (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_NEWER = 463  # the first number that is unknown here, setxattrat of Linux 6.13; the same on both architectures
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the numbers, AUDIT_ARCH_*

# BPF: load a word, jump if ==, if >=, if any bit is set, return
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL_WITH, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on both architectures
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_MAX_FILES = 64
# What a library may look up about the machine, besides its own files; it holds nothing of a user.
_SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"),
    *("/etc/localtime", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/dev/urandom", "/dev/null"),
)

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> list[str]:
    """Return the protections that this kernel does not offer, as sentences; [] if the sandbox is complete."""
    reasons = []
    wrapped = "bubblewrap stands in for it" if shutil.which("bwrap") else ""
    if landlock_version() < 1:
        reasons.append(f"Landlock (Linux 5.13): {wrapped or 'the child can read your files; install bubblewrap'}")
    elif landlock_version() < 4:
        reasons.append("Landlock 4 (Linux 6.7): the file rules hold, TCP is closed by seccomp alone")
    if not _has_seccomp():
        network = "the child can reach the network and your processes; install bubblewrap"
        reasons.append(f"seccomp on x86_64 or aarch64: {wrapped or network}")
    return reasons


def landlock_version() -> int:
    """Return the version of Landlock that the kernel offers, 0 for none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def _has_seccomp() -> bool:
    if not sys.platform.startswith("linux") or platform.machine() not in _ARCHITECTURES:
        return False
    return _libc.prctl(_PR_SET_SECCOMP, 2, None, 0, 0) < 0 and ctypes.get_errno() == errno.EFAULT


def bubblewrap(readable: Iterable[str]) -> list[str]:
    """Return the prefix that runs a command in bubblewrap; [] if it is not installed or not needed."""
    program = shutil.which("bwrap")
    if program is None or (landlock_version() >= 1 and _has_seccomp()):
        return []
    shown = [
        path for path in (*readable, "/usr", "/bin", "/lib", "/lib64") if not path.startswith(("/dev", "/proc", "/sys"))
    ]
    binds = [part for path in shown for part in ("--ro-bind-try", path, path)]
    namespaces = ["--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--dev", "/dev", "--proc", "/proc"]
    return [program, *namespaces, *binds, "--"]


def readable_paths(packages: Iterable[str] = ()) -> list[str]:
    """Return the files and folders that the interpreter and its packages are loaded from.

    Args:
        packages: files or folders of our own code.
    """
    installed = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages", "lib-dynload")]
    libraries = [entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    paths = {*packages, *installed, *libraries, *_SYSTEM, sys.prefix, sys.base_prefix}
    return sorted(os.path.realpath(path) for path in paths if os.path.exists(path))


def enter(readable: Iterable[str]) -> None:
    """Drop all rights except reading `readable`, the files that are already open, memory and time.

    The process must have one thread. Protections that the kernel lacks are skipped: see `missing`.

    Raises:
        OSError: a step that the kernel offers failed; the caller must not continue.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise OSError(errno.EBUSY, "a sandbox must be entered before a thread starts")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    _restrict_files(readable)
    header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked(_libc.capset(header, none), "capset")
    for kind, most in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, _MAX_FILES)):
        resource.setrlimit(kind, (most, most))
    if _has_seccomp():
        _filter_calls()


def _prctl(option: int, *values: object) -> None:
    _checked(_libc.prctl(option, *values, *[0] * (4 - len(values))), f"prctl {option}")


def _checked(result: int, doing: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"sandbox: {doing}: {os.strerror(ctypes.get_errno())}")
    return result


def _restrict_files(readable: Iterable[str]) -> None:
    version = landlock_version()
    if version < 1:
        return
    files = (1 << 13) - 1  # everything that version 1 knows
    for since, right in ((2, 13), (3, 14), (5, 15)):  # moving between folders, truncating, ioctl on devices
        files |= (version >= since) << right
    tcp, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)  # bind, connect; abstract sockets, signals
    rules = struct.pack("<QQQ", files, tcp, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(_libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0), "Landlock")
    for path in readable:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # paths that this user cannot access need no rule
            continue
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        rule = struct.pack("<Qi", rights, place)
        _checked(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"Landlock for {path}")
        os.close(place)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def _filter_calls() -> None:
    program = filter_program(platform.machine(), os.getpid())
    code = ctypes.create_string_buffer(program)
    prog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, 2, prog)


def filter_program(machine: str, pid: int) -> bytes:
    """Return the seccomp filter in BPF, eight bytes per instruction, for a machine of _ARCHITECTURES."""
    column, audit = _ARCHITECTURES[machine]

    def refuse_unless(call: tuple[int, int], allowed: int) -> list[tuple[int, int, int, int]]:
        """Refuse a call unless its first argument, of 32 bits, is the allowed one."""
        refused = _FAIL_WITH | errno.EPERM
        return [
            (_EQUAL, 0, 4, call[column]),
            (_LOAD, 0, 0, 16),
            (_EQUAL, 0, 1, allowed),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, refused),
        ]

    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # x32 has other call numbers, which would bypass the list
        steps += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL_PROCESS)]
    steps += [(_AT_LEAST, 0, 1, _NEWER), (_RETURN, 0, 0, _FAIL_WITH | errno.ENOSYS)]
    steps += refuse_unless(_KILL, pid) + refuse_unless(_TGKILL, pid) + refuse_unless(_PRLIMIT, 0)
    steps += refuse_unless(_AFFINITY, 0)
    steps += [(_EQUAL, 0, len(_IOCTLS) + 3, _IOCTL[column]), (_LOAD, 0, 0, 24)]
    steps += [(_EQUAL, len(_IOCTLS) - at, 0, request) for at, request in enumerate(_IOCTLS)]
    steps += [(_RETURN, 0, 0, _FAIL_WITH | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    for numbers, flags_at in _OPENING.values():
        if numbers[column] >= 0:
            steps += [(_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, flags_at), (_ANY_BIT, 0, 1, _WRITING)]
            steps += [(_RETURN, 0, 0, _FAIL_WITH | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    for numbers in _UNKNOWN.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _FAIL_WITH | errno.ENOSYS)]
    for number in refused_calls(machine).values():
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL_WITH | errno.EPERM)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def refused_calls(machine: str) -> dict[str, int]:
    """Return {system call: its number} of the calls that the filter refuses on a machine of _ARCHITECTURES."""
    column = _ARCHITECTURES[machine][0]
    rows = [entry.split() for entry in _REFUSED.replace("\n", "|").split("|") if entry]
    return {name: int(numbers[column]) for name, *numbers in rows if numbers[column] != "-"}
