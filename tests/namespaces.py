"""Set up two network namespaces with their own addresses, over a switch whose ports can be unplugged."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}


@dataclass(frozen=True)
class Net:
    """Namespaces `a` and `b` of this test."""

    name: str

    def inside(self, end: str) -> tuple[str, ...]:
        """Return the command prefix that runs a command in a namespace."""
        return ("ip", "netns", "exec", f"{self.name}{end}")

    def plug(self, end: str, is_in: bool) -> None:
        """Plug the cable of a namespace in or out at the switch; its own interface keeps its address and routes."""
        _ip("-n", f"{self.name}s", "link", "set", f"p{end}", "up" if is_in else "down")

    def block(self, end: str, port: int) -> None:
        """Block TCP connections from a namespace to a port."""
        words = ("rule", "add", "ipproto", "tcp", "dport", str(port), "prohibit")
        _ip("-n", f"{self.name}{end}", *words)


@contextmanager
def network() -> Iterator[Net]:
    """Yield two namespaces that reach each other; skip the test if this machine does not allow them."""
    net = Net(f"x{os.getpid()}")
    try:
        tried = subprocess.run(["ip", "netns", "add", f"{net.name}s"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("`ip` is not installed")
    if tried.returncode:
        pytest.skip(f"network namespaces are not allowed here: {tried.stderr.strip()}")
    try:
        _ip("-n", f"{net.name}s", "link", "add", "switch", "type", "bridge")
        _ip("-n", f"{net.name}s", "link", "set", "switch", "up")
        for end, address in ADDRESSES.items():
            there, switch = f"{net.name}{end}", f"{net.name}s"
            _ip("netns", "add", there)
            _ip("link", "add", f"v{end}", "netns", there, "type", "veth", "peer", "name", f"p{end}", "netns", switch)
            _ip("-n", switch, "link", "set", f"p{end}", "master", "switch", "up")
            _ip("-n", there, "link", "set", "lo", "up")
            _ip("-n", there, "link", "set", f"v{end}", "up")
            _ip("-n", there, "addr", "add", f"{address}/24", "dev", f"v{end}")
        yield net
    finally:
        for end in (*ADDRESSES, "s"):
            subprocess.run(["ip", "netns", "del", f"{net.name}{end}"], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
