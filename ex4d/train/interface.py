"""The network interface through which ranks reach each other.

gloo resolves this machine's host name, which is 127.0.1.1 on Debian: other machines cannot reach that. On other systems
the name is an address that other machines can reach, on which ranks of a single machine must not listen.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping

SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


def is_loopback(environment: Mapping[str, str]) -> bool:
    """Return whether MASTER_ADDR is the IPv4 loopback."""
    master = environment.get("MASTER_ADDR", "")
    return master == "localhost" or master.startswith("127.")


def towards_master(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the name of the interface towards MASTER_ADDR; None where there is none or it is IPv6."""
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
    # MASTER_ADDR is this machine's own name: the others reach it by one of its real addresses.
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
