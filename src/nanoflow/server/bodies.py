"""Parse and check request bodies: bounds are checked first, and long bodies are read in a thread.

Other calls are answered while megabytes of JSON are parsed. Decoding and checking hold the interpreter lock, so they
are two steps, each as short as possible, between which the event loop can run. Long bodies are read one after the
other. `call_bounds.py` has the bounds on what a body may ask for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from nanoflow.server.call_bounds import CallBounds
from nanoflow.server.errors import ApiError, invalid_body

# Bodies from this length on are read in a thread; shorter ones take a millisecond or two.
LONG_BODY_BYTES = 1 << 16


class BodyRoute(APIRoute):
    """A route whose body, a pydantic model, may be long."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with another way to read JSON."""
        handle = super().get_route_handler()
        model = self.body_field.field_info.annotation if self.body_field is not None else None

        async def read_and_handle(request: Request) -> Response:
            if model is not None:
                require_json(request.headers)
            reading = _Request(request, model)
            try:
                return await handle(reading)
            except HTTPException:
                if reading.problem is None:
                    raise
                raise reading.problem from None

        return read_and_handle


def require_json(headers: Headers) -> None:
    """Refuse a body that is not declared as JSON, such as a form of a web page, or curl without a header (415).

    Raises:
        ApiError: There is no content type, or another one than JSON.
    """
    given = headers.get("content-type")
    kind = (given or "").partition(";")[0].strip().lower()
    is_empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    if given is None and is_empty:
        return  # there is no body, which is reported elsewhere
    what = f"it says {given[:100]!r}" if given else "it does not say what it is"
    message = f"the body must be JSON, and {what}: send the header 'Content-Type: application/json'"
    raise ApiError(415, message, code="unsupported_media_type")


class _Request(Request):
    """A request that reads a long body by itself.

    Attributes:
        problem: Why the body was refused, if it was.
    """

    def __init__(self, request: Request, model: Any) -> None:
        super().__init__(request.scope, request.receive)
        self.problem: ApiError | None = None
        self._model = model

    async def json(self) -> Any:
        """The JSON value of the body; for a long body, the checked pydantic model."""
        body = await self.body()
        try:
            if len(body) < LONG_BODY_BYTES:
                return self._checked(body, json.loads)
            loop, reader = asyncio.get_running_loop(), self.app.state.body_reader
            value = await loop.run_in_executor(reader, self._checked, body, decode)
        except ApiError as problem:
            # Keep the error, because FastAPI would replace it.
            self.problem = problem
            raise HTTPException(problem.status) from problem
        if not (isinstance(self._model, type) and issubclass(self._model, BaseModel)):
            return value
        try:
            # With FastAPI's options, so that errors have the same words.
            return await loop.run_in_executor(reader, partial(self._model.model_validate, value, from_attributes=True))
        except ValidationError as error:
            # Raised here, because FastAPI would check the whole body again, in the event loop.
            problems = error.errors(include_url=False, include_input=False)
            self.problem = invalid_body([{**problem, "loc": ("body", *problem["loc"])} for problem in problems])
            raise HTTPException(400) from error

    def _checked(self, body: bytes, read: Callable[[bytes], Any]) -> Any:
        """Read a body and check that it is within the bounds of calls."""
        bounds: CallBounds = self.app.state.call_bounds
        bounds.check_text(body)
        try:
            value = read(body)
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        bounds.check(value, generates="max_tokens" in getattr(self._model, "model_fields", ()))
        return value


def add_body_reader(app: FastAPI, bounds: CallBounds) -> None:
    """Add to an application what its `BodyRoute`s need: the bounds of calls, and a thread for long bodies."""
    app.state.call_bounds = bounds
    app.state.body_reader = ThreadPoolExecutor(1, thread_name_prefix="body reader")


def decode(body: bytes) -> Any:
    """As `json.loads`, but in half the time for most texts.

    Raises:
        ValueError: The text is no JSON; the error is that of `json.loads`.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return json.loads(body)
