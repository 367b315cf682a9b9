"""Accept only requests with known names in the Host header, as a protection against DNS rebinding.

In that attack evil.example is made to resolve to 127.0.0.1, so that a page of that site can reach a server on this
machine. But the browser still sends `Host: evil.example`. `access.py` checks the names that may be allowed.
"""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from nanoflow.access import address_of, network_of
from nanoflow.config import ServerConfig
from nanoflow.server.errors import ApiError

ALL = "*"
# Names of this machine by RFC 6761, and its addresses.
LOOPBACK = ("localhost", "*.localhost", "127.0.0.0/8", "::1")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\\\s?#,]+)(?::([0-9]{0,5}))?")


def is_loopback(host: str) -> bool:
    """True if an address to listen at can be reached only from this machine."""
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    addresses = [address_of(str(entry[4][0]).partition("%")[0]) for entry in found]
    return all(address is not None and address.is_loopback for address in addresses)


def with_hosts(config: ServerConfig) -> ServerConfig:
    """The options with a default for the accepted hosts: all names that can mean the address to listen at."""
    if config.allowed_hosts is not None:
        return config
    hosts = (config.host, *LOOPBACK) if is_loopback(config.host) else (ALL,)
    return dataclasses.replace(config, allowed_hosts=hosts)


class Hosts:
    """The accepted hosts.

    Args:
        patterns: Names, `*.NAME` for all subdomains of a name, addresses, networks, `*` for all.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        names = [pattern.lower().removesuffix(".") for pattern in patterns]
        self._allows_all = ALL in names
        self._networks = [network for name in names if (network := network_of(name)) is not None]
        self._names = frozenset(names)
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))

    def allow(self, host: str) -> bool:
        """True if a name or an address, without port, is accepted."""
        name = host.lower().removesuffix(".")
        address = address_of(name)
        if address is not None:
            return self._allows_all or any(address in network for network in self._networks)
        return self._allows_all or name in self._names or name.endswith(self._suffixes)


class HostMiddleware:
    """Refuses requests for other hosts (403), and requests without a valid Host header (400).

    Args:
        app: The application behind it.
        hosts: The accepted hosts.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        problem = None if scope["type"] == "lifespan" else self._problem(scope)
        if problem is None:
            return await self._app(scope, receive, send)
        return await problem.response()(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        values = [value for name, value in scope["headers"] if name.lower() == b"host"]
        if not values and scope.get("http_version") == "1.0":
            return None  # it has no such header; what a browser sends does
        if len(values) != 1:
            return ApiError(400, f"a request has one Host header, this one has {len(values)}", code="invalid_host")
        text = values[0].decode("latin-1").strip()
        parts = _HOST.fullmatch(text)
        if parts is None or (parts[1].startswith("[") and address_of(parts[1]) is None):
            return ApiError(400, f"the Host header {text[:200]!r} is no host", code="invalid_host")
        if self._hosts.allow(parts[1]):
            return None
        message = f"this server does not answer for the host {parts[1][:200]!r} (option --allowed-hosts)"
        return ApiError(403, message, code="host_not_allowed")
