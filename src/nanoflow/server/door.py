"""Checks of every request before it reaches a route: request ids, hosts, origins, API keys.

`door` wraps the whole application with its error pages, so no request avoids the checks. From the outermost to the
innermost: the `x-request-id` of the answer and a refusal of WebSockets, errors of /v1/messages in their own shape
(`message_errors.py`), an answer to cancelled calls, the Host header (`hosts.py`), CORS, the API key (`keys.py`), and
HEAD.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoflow.access import several
from nanoflow.config import ServerConfig
from nanoflow.server.errors import ApiError
from nanoflow.server.gate import DRAINING
from nanoflow.server.hosts import ALL, HostMiddleware, Hosts
from nanoflow.server.keys import KeyMiddleware, Keys
from nanoflow.server.message_errors import MessageErrorsMiddleware
from nanoflow.server.page import is_of_page

REQUEST_ID = "x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,128}")
_POLICY_VIOLATION = 1008  # close code of WebSockets


def door(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """The application wrapped in all checks."""
    app = HeadMiddleware(app)
    keys, origins = several(config.api_key), several(config.allowed_origins)
    if keys:
        app = KeyMiddleware(app, Keys(keys), None if config.disable_page else is_of_page)
    if origins:
        app = _Origins(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, "retry-after"),
        )
    hosts = (ALL,) if config.allowed_hosts is None else several(config.allowed_hosts)
    app = MessageErrorsMiddleware(CancelledMiddleware(HostMiddleware(app, Hosts(hosts))))
    return RequestIdMiddleware(app)


class _Origins(CORSMiddleware):
    """CORS, with errors in OpenAI's shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer the preflight request of a browser."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = "the origin, method or headers of the page are not allowed (option --allowed-origins)"
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return ApiError(response.status_code, message, code="origin_not_allowed").response(kept)


class RequestIdMiddleware:
    """Gives each answer an `x-request-id`, the client's own if it is short and plain. Refuses WebSockets.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = request_id_of(scope["headers"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        return await self._app(scope, receive, send_with_id)


class CancelledMiddleware:
    """Answers a call that is cancelled because the server ends with an error in JSON; uvicorn would send a plain 500.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if has_begun:
                raise
            problem = ApiError(503, "the server has ended, and this request with it", code=DRAINING.code)
            await problem.response()(scope, receive, send)


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's id of a request if it can be sent back, else a new id."""
    given = [value for name, value in headers if name.lower() == REQUEST_ID.encode()]
    if len(given) == 1 and _SANE_ID.fullmatch(given[0]):
        return given[0].decode()
    return f"req-{uuid.uuid4().hex}"


class HeadMiddleware:
    """Answers HEAD as GET, without the body.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        return await self._app({**scope, "method": "GET"}, receive, send_head)
