"""Answer requests that offer an upgrade to another protocol in HTTP/1.1, as the standard allows.

Java's HttpClient offers HTTP/2 with its first request. The parser of httptools treats what follows the head as the
other protocol, so the body of such a request would be lost. `wire.py` corrects other shortcomings of uvicorn.
"""

from __future__ import annotations

from typing import Any

import httptools

INVALID = "the bytes are no HTTP request"


def without_upgrades(base: Any) -> Any:
    """Make a protocol class that parses a request with an `Upgrade` header a second time, without that header.

    Args:
        base: uvicorn's `HttpToolsProtocol`, or a subclass.
    """

    class Protocol(base):  # type: ignore[misc]
        """The class that `without_upgrades` makes."""

        parser: Any

        def data_received(self, data: bytes) -> None:
            """Read, as `base` does."""
            self._unset_keepalive_if_required()
            rest = memoryview(data)
            try:
                while rest:
                    rest = self._read_some(rest)
            except httptools.HttpParserError:
                self.logger.debug(INVALID)
                self.send_400_response(INVALID)

        def _read_some(self, data: memoryview) -> memoryview:
            """Parse up to the end of the first request that offers an upgrade; return the rest."""
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError(INVALID) from None
                head = plain_head(self.parser, self.url, self.headers)
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(head)
                return data[upgrade.args[0] :]
            return data[:0]

        def on_headers_complete(self) -> None:
            """Begin the request, unless it will be parsed a second time."""
            if not self.parser.should_upgrade():
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            """End the body, unless the request will be parsed a second time."""
            if not self.parser.should_upgrade():
                super().on_message_complete()

    return Protocol


def plain_head(parser: Any, url: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The head of a request without its `Upgrade` header.

    Args:
        parser: The parser that has read it.
        url: The URL as it was sent.
        headers: Headers in order, with names in lower case.
    """
    lines = [b" ".join((parser.get_method(), url, b"HTTP/" + parser.get_http_version().encode()))]
    lines += [name + b": " + value for name, value in headers if name != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"
