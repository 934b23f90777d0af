"""The meeting place of ranks that are all on this machine: a store of torch's that listens on the loopback alone.

torch's own `env://` listens on all addresses even where MASTER_ADDR is 127.0.0.1, and its store asks for no password.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import TCPStore, register_rendezvous_handler

from ex4d.train.interface import is_loopback


def init_method() -> str | None:
    """Return the `init_method` for the environment; None: torch's own, which finds a store that torchrun started."""
    if not is_loopback(os.environ) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    return _registered()


@cache
def _registered() -> str:
    """Make the URL known to torch, which takes it once, and return it."""
    register_rendezvous_handler("loopback", _meet)
    return "loopback://"


def _meet(url: str, timeout: timedelta, **_: object) -> Iterator[tuple[TCPStore, int, int]]:
    """Yield (store, rank, number of ranks), as torch asks for it; rank 0 is the server."""
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    host = "127.0.0.1" if master == "localhost" else master
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own: dict[str, Any] = {}
    if rank == 0:
        own["master_listen_fd"] = socket.create_server((host, port), backlog=128).detach()
    yield TCPStore(host, port, count, rank == 0, timeout, **own), rank, count
