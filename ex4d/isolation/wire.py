"""Messages between a process and its isolated child: JSON, plus arrays and bytes as they lie in memory. No pickles.

The parent must survive whatever a compromised child sends. So lengths are capped before anything is allocated, arrays
must have the length that their shapes require, and only the classes of DATACLASSES are built.
An input file travels as a file descriptor: the child can read it, and no other file.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ex4d.errors import BadSample

# Classes that may be sent besides plain values, as "module:Class".
DATACLASSES = (
    *("ex4d.video.source:VideoInfo", "ex4d.depth.arrays:Wanted"),
    *("ex4d.data.sample:Sample", "ex4d.data.sample:SampleSpec"),
)
MAX_JSON_BYTES = 64 << 20
MAX_PARTS = 4096
_LENGTHS = struct.Struct("<II")
_LENGTH = struct.Struct("<Q")
_MAX_FDS = 8


class ProtocolError(Exception):
    """The other side sent an invalid message."""


@dataclasses.dataclass(frozen=True)
class File:
    """A local file that the child receives opened for reading, instead of its path."""

    path: str

    def open(self) -> io.FileIO:
        """Return the open file. Raises BadSample: unreadable; open_error for a pipe, a device or a folder."""
        try:
            # Opening a pipe could wait forever for a writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise BadSample("unreadable", error.strerror or type(error).__name__) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BadSample("open_error", "is not a regular file")
        return io.FileIO(fd)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A message that is ready to be sent: parts in order, and the open files that are sent with the first part."""

    parts: list[memoryview]
    files: list[io.FileIO]


def pack(message: Any) -> Packed:
    """Serialise a message for `transmit`. Raises TypeError for unsupported types; BadSample if a File does not open."""
    parts: list[memoryview] = []
    files: list[io.FileIO] = []
    try:
        body = json.dumps(_plain(message, parts, files), separators=(",", ":")).encode()
    except BaseException:
        _close(files)
        raise
    lengths = b"".join(_LENGTH.pack(part.nbytes) for part in parts)
    head = _LENGTHS.pack(len(body), len(parts))
    return Packed([memoryview(head), memoryview(lengths + body), *parts], files)


def transmit(sock: socket.socket, packed: Packed, deadline: float | None = None) -> None:
    """Send a packed message and close its files. Raises TimeoutError at the deadline."""
    try:
        sock.settimeout(_remaining(deadline))
        head, *rest = packed.parts
        if packed.files:
            socket.send_fds(sock, [head], [file.fileno() for file in packed.files])
        else:
            sock.sendall(head)
        for part in rest:
            while part.nbytes:
                sock.settimeout(_remaining(deadline))
                part = part[sock.send(part[: 1 << 20]) :]
    finally:
        _close(packed.files)


def send(sock: socket.socket, message: Any, deadline: float | None = None) -> None:
    """Send one message; see `pack` and `transmit`."""
    transmit(sock, pack(message), deadline)


def _close(files: list[io.FileIO]) -> None:
    for file in files:
        file.close()


def receive(sock: socket.socket, deadline: float | None = None, max_bytes: int = 2**40, files: bool = False) -> Any:
    """Receive one message.

    Args:
        max_bytes: limit for all arrays and bytes together.
        files: whether it may contain File; each becomes an open binary file, which the caller closes.

    Raises:
        EOFError: the other side has closed. TimeoutError: at the deadline. ProtocolError: invalid message.
    """
    sock.settimeout(_remaining(deadline))
    opened: list[int] = []
    head = bytearray()
    if files:
        first, opened, *_ = socket.recv_fds(sock, _LENGTHS.size, _MAX_FDS)
        head += first
        if not head:
            raise EOFError
    head += _read(sock, _LENGTHS.size - len(head), deadline)
    num_json, count = _LENGTHS.unpack(head)
    if num_json > MAX_JSON_BYTES or count > MAX_PARTS:
        raise ProtocolError(f"{num_json} bytes of JSON and {count} arrays")
    lengths = [_LENGTH.unpack(_read(sock, _LENGTH.size, deadline))[0] for _ in range(count)]
    if sum(lengths) > max_bytes:
        raise ProtocolError(f"{sum(lengths)} bytes where {max_bytes} are allowed")
    body = _read(sock, num_json, deadline)
    parts = [_read(sock, length, deadline) for length in lengths]
    try:
        return _value(json.loads(body), parts, opened)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, MemoryError) as error:
        raise ProtocolError(f"{type(error).__name__}: {error}"[:200]) from None


def _plain(value: Any, parts: list[memoryview], files: list[io.FileIO]) -> Any:
    """Convert a value to what JSON can hold; arrays and bytes go to `parts`, open files to `files`."""

    def plain(child: Any) -> Any:
        return _plain(child, parts, files)

    if value is None or (isinstance(value, bool | int | float | str) and type(value).__module__ == "builtins"):
        return value
    if isinstance(value, list):
        return [plain(child) for child in value]
    if isinstance(value, tuple):
        return {"tuple": [plain(child) for child in value]}
    if isinstance(value, dict):
        return {"dict": [[plain(name), plain(child)] for name, child in value.items()]}
    if isinstance(value, bytes | bytearray | memoryview):
        parts.append(memoryview(value).cast("B"))
        return {"bytes": len(parts) - 1}
    if isinstance(value, Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if isinstance(value, File):
        files.append(value.open())
        return {"file": len(files) - 1}
    if dataclasses.is_dataclass(value) and _name(type(value)) in DATACLASSES:
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": [_name(type(value)), fields]}
    return _plain_array(value, parts)


def _plain_array(value: Any, parts: list[memoryview]) -> Any:
    import numpy as np

    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        array = np.ascontiguousarray(value)
        parts.append(memoryview(array.reshape(-1).view(np.uint8).data))
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: [len(parts) - 1, value.dtype.str, [*value.shape]]}
    raise TypeError(f"{type(value).__name__} may not cross to or from an isolated process")


def _value(plain: Any, parts: list[bytearray], fds: list[int]) -> Any:
    """Rebuild a value from the result of `_plain`. Raises what `receive` turns into a ProtocolError."""
    if isinstance(plain, list):
        return [_value(child, parts, fds) for child in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, body),) = plain.items()
    makers: dict[str, Callable[[], Any]] = {
        "tuple": lambda: tuple(_value(child, parts, fds) for child in body),
        "dict": lambda: {_value(name, parts, fds): _value(child, parts, fds) for name, child in body},
        "bytes": lambda: bytes(parts[body]),
        "fraction": lambda: Fraction(int(body[0]), int(body[1])),
        "file": lambda: os.fdopen(fds[body], "rb"),
        "class": lambda: _class(body[0])(**{name: _value(child, parts, fds) for name, child in body[1].items()}),
        "array": lambda: _array(body, parts),
        "scalar": lambda: _array(body, parts)[()],
    }
    return makers[kind]()


def _array(body: list[Any], parts: list[bytearray]) -> Any:
    import numpy as np

    index, kind, shape = body
    dtype = np.dtype(kind)
    sides = all(isinstance(side, int) and side >= 0 for side in shape)
    if dtype.kind not in "biuf" or not sides or math.prod(shape) * dtype.itemsize != len(parts[index]):
        raise ValueError(f"an array of {kind} {shape} in {len(parts[index])} bytes")
    return np.frombuffer(parts[index] or bytearray(dtype.itemsize), dtype)[: math.prod(shape)].reshape(shape)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> Any:
    if name not in DATACLASSES:
        raise ValueError(f"class {name!r}")
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


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
