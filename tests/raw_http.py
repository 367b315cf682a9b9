"""HTTP as bytes on a socket, for requests that client libraries cannot send."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit


def connect(root_url: str) -> socket.socket:
    parts = urlsplit(root_url)
    return socket.create_connection((str(parts.hostname), parts.port or 80), timeout=10)


def ask(root_url: str, request: bytes, *, half_closes: bool = False) -> bytes:
    """All bytes received until the server closes the connection."""
    with connect(root_url) as connection:
        connection.sendall(request)
        if half_closes:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def get(target: str, *, method: str = "GET", version: str = "1.1", headers: str = "Host: toy\r\n") -> bytes:
    """Send a request that asks the server to close the connection afterwards."""
    return f"{method} {target} HTTP/{version}\r\n{headers}Connection: close\r\n\r\n".encode()


def post(path: str, fields: Any, *, version: str = "1.1", headers: str = "") -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: toy\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def split(answer: bytes) -> tuple[str, bytes]:
    """Head in lower case, and body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode().lower(), body
