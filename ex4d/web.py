"""Limit the hosts that a process may reach: a URL in a list or a redirect must not reach this machine's local network.

The address is checked when the socket is created, so every spelling, every DNS name and every redirect passes the same
check, and a name that changes its address between two look-ups gains nothing. By default, a host that the caller itself
names may be private, and one that a redirect names must be public.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import aiohttp

_PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")  # of protocols; Python 3.11 calls some of its addresses global
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # its last 32 bits are an IPv4 address


@lru_cache(maxsize=1024)  # a list of a million URLs names few hosts
def has_host(url: str) -> bool:
    """Return whether the host and port of a URL can be parsed."""
    try:
        urlsplit(url).port  # noqa: B018 (reading it parses it)
    except ValueError:
        return False
    return True


class PrivateHost(OSError):
    """A request was for an address that is not public."""


class OtherHost(FileNotFoundError):
    """A request was redirected to another host, which the rules forbid."""


@dataclass(frozen=True)
class Rules:
    """What a request may reach.

    Args:
        private: hosts that may have a private address: "none", only the host that the caller "named", or "any".
        same_host: do not follow redirects to another host.
    """

    private: Literal["none", "named", "any"] = "named"
    same_host: bool = False


_DEFAULT = Rules()
_rules: ContextVar[Rules] = ContextVar("rules", default=_DEFAULT)
_asked: ContextVar[str] = ContextVar("asked", default="")  # host of the request for which a socket is created


@contextmanager
def rules(**changes: Any) -> Iterator[None]:
    """Set fields of Rules for the requests of this thread inside the block."""
    token = _rules.set(replace(_rules.get(), **changes))
    try:
        yield
    finally:
        _rules.reset(token)


def client_kwargs(url: str) -> dict[str, Any]:
    """Return the arguments of `client` for a session that opens `url` under the rules of this thread."""
    return {"rules": _rules.get(), "named": urlsplit(url).hostname or ""}


async def client(rules: Rules, named: str, **kwargs: Any) -> aiohttp.ClientSession:
    """Create a session that enforces the rules. `named` is the host that the caller named."""
    import aiohttp

    async def note_host(
        request: aiohttp.ClientRequest, handler: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
    ) -> aiohttp.ClientResponse:
        host = request.url.host or ""
        if rules.same_host and host.lower() != named:
            raise OtherHost(errno.ENOENT, "a redirect to another host, which is not followed")
        token = _asked.set(host.lower())
        try:
            return await handler(request)
        finally:
            _asked.reset(token)

    def open_socket(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        may_be_private = rules.private == "any" or (rules.private == "named" and _asked.get() == named)
        if not may_be_private and not is_public(address[0]):
            raise PrivateHost(errno.EACCES, "is at a private address; preprocess.allow_private_hosts=true takes it")
        return socket.socket(family, kind, protocol)

    connector = aiohttp.TCPConnector(socket_factory=open_socket)
    return aiohttp.ClientSession(connector=connector, middlewares=(note_host,), **{**kwargs, "trust_env": False})


def is_public(address: str) -> bool:
    """Return False for loopback, private, link-local, multicast and reserved addresses, also if wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    elif ip in _PROTOCOLS:
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
