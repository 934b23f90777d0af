"""Which network interface the ranks of several machines use."""

from __future__ import annotations

import socket

import pytest

from ex4d.train import interface


@pytest.mark.parametrize("master", ["", "::1"])
def test_without_a_master_or_with_ipv6_there_is_none(master):
    assert interface.towards_master({"MASTER_ADDR": master}) is None


@pytest.mark.parametrize("master", ["localhost", "127.0.0.1"])
def test_ranks_of_one_machine_use_the_loopback(master):
    assert dict(interface._addresses())[interface.towards_master({"MASTER_ADDR": master})] == "127.0.0.1"


def test_the_interface_is_that_of_the_route_to_the_master():
    own = dict(interface._addresses())
    name, address = next((n, a) for n, a in own.items() if not a.startswith("127."))
    assert interface.towards_master({"MASTER_ADDR": address}) == name


def test_a_name_of_this_machine_at_127_0_1_1_is_not_the_loopback_interface(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: None)
    monkeypatch.setattr(socket.socket, "getsockname", lambda _: ("127.0.1.1", 1))
    found = interface.towards_master({"MASTER_ADDR": "debian"})
    assert found is not None
    assert not dict(interface._addresses())[found].startswith("127.")
