"""One process group of one rank per session, so that most training tests start no processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from make_run import make_base, make_dataset

from ex4d.train.config import Place


@pytest.fixture(scope="session")
def alone():
    """This process as the only rank of a started engine."""
    from ex4d.train import engine

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place = Place(0, 1, 0)
    engine.start(place, "cpu")
    # What a launcher would have set must not reach the processes that other tests start.
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    yield place
    engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder per module, with a dataset and an untrained base."""
    path = tmp_path_factory.mktemp("train")
    make_dataset(path)
    make_base(path)
    return path
