"""Choose the network interface through which ranks reach each other.

gloo listens on the address of this machine's host name. On Debian that is 127.0.1.1, which other machines cannot reach;
on other systems other machines can reach it, which the ranks of a single-machine run must not allow.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping

SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


def is_loopback(environment: Mapping[str, str]) -> bool:
    """Return whether MASTER_ADDR is an IPv4 loopback address."""
    master = environment.get("MASTER_ADDR", "")
    return master == "localhost" or master.startswith("127.")


def towards_master(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the name of the interface that reaches MASTER_ADDR; None if there is none or the address is IPv6."""
    env = os.environ if environment is None else environment
    master = env.get("MASTER_ADDR", "")
    if master == "" or ":" in master:
        return None
    by_name = dict(_addresses())
    if is_loopback(env):
        return next((name for name, address in by_name.items() if address == "127.0.0.1"), None)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, int(env.get("MASTER_PORT", "1"))))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None  # the rendezvous reports the error
    if not own.startswith("127."):
        return next((name for name, address in by_name.items() if address == own), None)
    # MASTER_ADDR is this machine's own name: other machines reach it by one of its real addresses.
    return next((name for name, address in by_name.items() if not address.startswith("127.")), None)


def _addresses() -> list[tuple[str, str]]:
    """Return (interface, IPv4 address) of each interface that has one."""
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # has no address
            addresses.append((name, socket.inet_ntoa(answer[20:24])))
    return addresses
