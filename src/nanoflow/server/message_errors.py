"""Errors of /v1/messages in Anthropic's shape, wherever they come from: keys, bounds, the gate, routes and streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoflow.server.errors import ApiError
from nanoflow.server.message_bodies import MessageError, MessageErrorDetail

PATH = "/v1/messages"
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def message_error(status: int, error: Mapping[str, Any]) -> MessageError:
    """An error in Anthropic's shape.

    Args:
        status: HTTP status.
        error: The error in OpenAI's shape.
    """
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    detail: MessageErrorDetail = {"type": kind, "message": error["message"]}
    if error.get("param") is not None:
        detail["param"] = error["param"]
    if error.get("code") is not None:
        detail["details"] = {"error_code": error["code"]}
    return {"type": "error", "error": detail}


def message_error_of(problem: ApiError) -> MessageError:
    """An error in Anthropic's shape, as the event of a stream."""
    return message_error(problem.status, problem.body()["error"])


class MessageErrorsMiddleware:
    """Gives error answers below /v1/messages their shape.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or not (scope["path"] == PATH or scope["path"].startswith(f"{PATH}/")):
            return await self._app(scope, receive, send)
        return await self._app(scope, receive, _Shaping(send).send)


class _Shaping:
    """Sends an answer; a refusal is held back until it is whole, then sent in its shape."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._pieces: list[bytes] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_refusal(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                body = _shaped(self._start["status"], b"".join(self._pieces))
                MutableHeaders(scope=self._start)["content-length"] = str(len(body))
                await self._send(self._start)
                await self._send({"type": "http.response.body", "body": body})


def _is_refusal(start: Message) -> bool:
    kind = Headers(scope=start).get("content-type", "")
    return bool(start["status"] >= 400) and kind.startswith("application/json")


def _shaped(status: int, body: bytes) -> bytes:
    """The body of an error in Anthropic's shape; one to HEAD is empty, and stays so."""
    return msgspec.json.encode(message_error(status, msgspec.json.decode(body)["error"])) if body else body
