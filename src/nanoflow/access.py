"""Options that say who may use the HTTP server: API keys, host names, origins of web pages, and TLS.

This file checks their values. Keys are read and compared in `server/keys.py`, host names are compared in
`server/hosts.py`, and certificates are loaded in `server/tls.py`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nanoflow.batch_options import BatchServerOptions
from nanoflow.option import ConfigError, option

MIN_KEY_CHARS, MAX_KEY_CHARS = 1, 1024
_KEY = re.compile(rf"[\x21-\x7e]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}")
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


def _secret(text: str) -> Any:
    """Declare an option that is left out of the repr of its dataclass."""
    return dataclasses.field(default=(), repr=False, metadata={"help": text, "read": None})


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessOptions(BatchServerOptions):
    """Who may use the HTTP server."""

    api_key: str | Sequence[str] = _secret(
        "Key without which nothing but /health and the page at / answers, may be given several times; the file and the "
        "environment variable NANOFLOW_API_KEY keep it out of the list of processes"
    )
    api_key_file: str | None = option(
        None, "File with such keys, one a line; lines that begin with # are comments. Read once, at the start"
    )
    prefix_cache_per_key: bool = option(
        False,
        "Share cached pages of prompts only between requests with the same API key, so that none can measure "
        "what others have asked",
    )
    allowed_hosts: str | Sequence[str] | None = option(
        None,
        "Name in the Host header that is answered, may be given several times: a name, *.NAME, an address, a "
        "network as 10.0.0.0/8, or * for all. If not given: names of the loopback where --host is one, else all",
    )
    allowed_origins: str | Sequence[str] = option(
        (),
        "Origin of web pages that may read answers (CORS), such as https://app.example, may be given several times; "
        "* for all, none if not given",
    )
    ssl_certfile: str | None = option(None, "Certificate chain (PEM): answer https instead of http")
    ssl_keyfile: str | None = option(None, "Private key of the certificate (PEM); in the same file if not given")
    ssl_ca_certs: str | None = option(
        None, "Certificates (PEM) of those who sign clients' certificates: clients without one are refused"
    )

    def check_access(self) -> None:
        """Check keys, host names and origins, and that options of TLS fit together.

        Raises:
            ConfigError: One is invalid; the message never quotes a key.
        """
        for key in several(self.api_key):
            check_key(key, "api_key")
        for host in several(self.allowed_hosts):
            check_host_pattern(host)
        for origin in several(self.allowed_origins):
            _check_origin(origin)
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("ssl_keyfile and ssl_ca_certs need ssl_certfile: the server's own certificate")


def several(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The values of an option that may be given several times; a single string is one value."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def check_key(key: str, where: str) -> None:
    """Refuse a key that no client can send in a header.

    Raises:
        ConfigError: The key has other characters or a wrong length. The message names `where`, and quotes no key.
    """
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{where}: a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII characters without blanks"
        )


def check_host_pattern(pattern: str) -> None:
    """Raise a `ConfigError` unless the pattern is a host name, an address, a network, or *."""
    if pattern == "*" or network_of(pattern) is not None or _NAME.fullmatch(pattern.lower().removesuffix(".")):
        return
    raise ConfigError(
        f"allowed_hosts: {pattern!r} is no name of a host; give it without scheme, port and path, as api.example, "
        "*.example, 10.0.0.5, 10.0.0.0/8, ::1 or *"
    )


def network_of(pattern: str) -> Network | None:
    """A pattern as a network of IP addresses; an address is a network of one. None for a name."""
    try:
        return ipaddress.ip_network(address_of(pattern) or pattern)
    except ValueError:
        return None


def address_of(host: str) -> Address | None:
    """A host as an IP address, with or without brackets; None for a name."""
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _check_origin(origin: str) -> None:
    if origin == "*":
        return
    try:
        parts = urlsplit(origin)
        is_origin = bool(parts.scheme and parts.hostname) and origin == f"{parts.scheme}://{parts.netloc}"
        is_origin = is_origin and "@" not in parts.netloc and (parts.port is None or parts.port > 0)
    except ValueError:
        is_origin = False
    if not is_origin:
        raise ConfigError(
            f"allowed_origins: {origin!r} is no origin; one has a scheme and a host and no path, as "
            "https://app.example or http://localhost:3000, or * for all"
        )
