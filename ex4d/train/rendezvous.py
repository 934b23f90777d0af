"""Rendezvous for ranks that are all on this machine: a torch TCPStore that listens on the loopback only.

torch's `env://` listens on all addresses even if MASTER_ADDR is 127.0.0.1, and its store asks for no password.
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
    """Return the `init_method` for the environment; None: torch's default, which also uses a store of torchrun."""
    if not is_loopback(os.environ) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    return _registered()


@cache
def _registered() -> str:
    """Register the URL scheme with torch, which accepts it only once, and return the URL."""
    register_rendezvous_handler("loopback", _meet)
    return "loopback://"


def _meet(url: str, timeout: timedelta, **_: object) -> Iterator[tuple[TCPStore, int, int]]:
    """Yield (store, rank, number of ranks), as torch's rendezvous protocol requires; rank 0 is the server."""
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    host = "127.0.0.1" if master == "localhost" else master
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own: dict[str, Any] = {}
    if rank == 0:
        own["master_listen_fd"] = socket.create_server((host, port), backlog=128).detach()
    yield TCPStore(host, port, count, rank == 0, timeout, **own), rank, count
