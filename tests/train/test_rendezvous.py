"""Ranks of one machine meet on the loopback, which no other machine can reach."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from ex4d.train import rendezvous

RANK = """
import sys, torch
from ex4d.train import engine
from ex4d.train.config import place_from_environment
engine.start(place_from_environment(), "cpu")
summed = torch.ones(3)
torch.distributed.all_reduce(summed)
print(summed.tolist(), flush=True)
sys.stdin.readline()
engine.stop()
"""


@pytest.mark.parametrize("master", ["127.0.0.1", "localhost"])
def test_ranks_of_one_machine_listen_on_the_loopback_alone(master):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": master, "MASTER_PORT": str(port)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in range(2)]
    try:
        for rank in ranks:
            assert any("[2.0, 2.0, 2.0]" in line for line in rank.stdout)
        places = [c.laddr for rank in ranks for c in psutil.Process(rank.pid).net_connections() if c.status == "LISTEN"]
        assert port in [place.port for place in places]
        assert {place.ip for place in places} == {"127.0.0.1"}
        for rank in ranks:
            rank.communicate("\n", timeout=60)
        assert [rank.returncode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_other_launchers_keep_their_own_meeting_place(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert rendezvous.init_method() == "loopback://"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as torchrun sets it
    assert rendezvous.init_method() is None
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert rendezvous.init_method() is None
