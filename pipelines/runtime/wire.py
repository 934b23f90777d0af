"""Messages between a process and its isolated child: pickles whose arrays travel as they lie in memory."""

from __future__ import annotations

import pickle
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(sock: socket.socket, message: Any, deadline: float | None = None) -> None:
    """Send one message: the lengths, the pickle, then each array's bytes as they lie in memory."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    header = b"".join(_LENGTH.pack(number) for number in (len(parts), *(part.nbytes for part in parts)))
    for part in (memoryview(header), *parts):
        while part.nbytes:
            sock.settimeout(_remaining(deadline))
            part = part[sock.send(part[: 1 << 20]) :]


def receive(sock: socket.socket, deadline: float | None = None) -> Any:
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
