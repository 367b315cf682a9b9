"""Bodies become values: what is too much is refused first, and long ones are read beside the event loop.

Other calls are answered while megabytes of JSON are parsed. Decoding and checking hold the interpreter lock. So they
are two steps, each as short as can be, with room for the event loop in between, and one body is read after the other.
How much a body may ask for is in `call_bounds.py`.
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

# Shorter bodies take less than a millisecond or two.
LONG_BODY_BYTES = 1 << 16


class BodyRoute(APIRoute):
    """A route whose body, a model of pydantic's, may be long."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, with another way to read JSON."""
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
    """Refuse a body that does not say that it is JSON: a form of a web page, or curl without a header (415).

    Raises:
        ApiError: The content type is another, or there is none.
    """
    given = headers.get("content-type")
    kind = (given or "").partition(";")[0].strip().lower()
    is_empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    if given is None and is_empty:
        return  # what is missing is the body
    what = f"it says {given[:100]!r}" if given else "it does not say what it is"
    message = f"the body must be JSON, and {what}: send the header 'Content-Type: application/json'"
    raise ApiError(415, message, code="unsupported_media_type")


class _Request(Request):
    """A request that reads a long body for itself.

    Attributes:
        problem: Why the body was refused, if it was.
    """

    def __init__(self, request: Request, model: Any) -> None:
        super().__init__(request.scope, request.receive)
        self.problem: ApiError | None = None
        self._model = model

    async def json(self) -> Any:
        """The body's value; of a long body the model itself."""
        body = await self.body()
        try:
            if len(body) < LONG_BODY_BYTES:
                return self._checked(body, json.loads)
            loop, reader = asyncio.get_running_loop(), self.app.state.body_reader
            value = await loop.run_in_executor(reader, self._checked, body, decode)
        except ApiError as problem:
            # FastAPI lets no other errors through.
            self.problem = problem
            raise HTTPException(problem.status) from problem
        if not (isinstance(self._model, type) and issubclass(self._model, BaseModel)):
            return value
        try:
            # With the options that FastAPI gives, for errors in the same words.
            return await loop.run_in_executor(reader, partial(self._model.model_validate, value, from_attributes=True))
        except ValidationError as error:
            # FastAPI would check all of it again, in the event loop.
            problems = error.errors(include_url=False, include_input=False)
            self.problem = invalid_body([{**problem, "loc": ("body", *problem["loc"])} for problem in problems])
            raise HTTPException(400) from error

    def _checked(self, body: bytes, read: Callable[[bytes], Any]) -> Any:
        """The value of a body within the bounds of calls."""
        bounds: CallBounds = self.app.state.call_bounds
        bounds.check_text(body)
        try:
            value = read(body)
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        bounds.check(value, generates="max_tokens" in getattr(self._model, "model_fields", ()))
        return value


def add_body_reader(app: FastAPI, bounds: CallBounds) -> None:
    """Give an application what its `BodyRoute`s read bodies with: the bounds of calls, and a thread for long bodies."""
    app.state.call_bounds = bounds
    app.state.body_reader = ThreadPoolExecutor(1, thread_name_prefix="body reader")


def decode(body: bytes) -> Any:
    """`json.loads`, in half the time for what both can read.

    Raises:
        ValueError: It is no JSON; as `json.loads` has it.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return json.loads(body)
