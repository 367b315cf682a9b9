"""Errors in OpenAI's shape: `ApiError`, handlers that turn every failure into one, and their OpenAPI description.

A message is for the sender of the request: it says what to change and tells nothing about the server's internals.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from nanoflow.engine.errors import EngineDeadError
from nanoflow.request import RequestError
from nanoflow.server.responses import ErrorResponse
from nanoflow.server.routes import allowed_methods, no_such_route

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 1000
MAX_PROBLEMS_SHOWN = 4
MAX_PATH_CHARS = 100
CLIENT_CLOSED_REQUEST = 499
INTERNAL_ERROR = "internal error; the server's log says more"

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request asks for something that cannot be done"},
    404: {"model": ErrorResponse, "description": "No such model"},
    "4XX": {"model": ErrorResponse, "description": "The request is refused"},
    503: {"model": ErrorResponse, "description": "The engine does not run"},
}

_STATUS_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_STATUS_TYPES |= {405: "invalid_request_error", 429: "rate_limit_error"}
_STATUS_TYPES |= {500: "server_error", 503: "server_error", 504: "server_error"}


class ApiError(Exception):
    """A failure that is reported to the client.

    Attributes:
        status: HTTP status.
        message: One sentence to be read by people.
        param: The field of the body that is wrong.
        code: A word to be read by programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> ErrorResponse:
        """The error in OpenAI's shape, free of lone surrogates, which no JSON can carry."""
        return {
            "error": {
                "message": _printable(self.message),
                "type": "server_error"
                if self.status >= 500
                else _STATUS_TYPES.get(self.status, "invalid_request_error"),
                "param": None if self.param is None else _printable(self.param),
                "code": self.code,
            }
        }

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The error as an answer."""
        return json_response(self.body(), self.status, {**(headers or {}), **(self.headers or {})} or None)


class ClientDisconnectedError(Exception):
    """The client has disconnected; its call is cancelled."""


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a JSON body."""
    return Response(
        msgspec.json.encode(body), status, dict(headers) if headers is not None else None, "application/json"
    )


@contextmanager
def user_errors(
    param: str | None = None,
    *,
    fields: Mapping[str, str] = {},
    explain: Callable[[RequestError], RequestError] | None = None,
) -> Iterator[None]:
    """Convert the errors of a request (`RequestError`) and of a dead engine, raised in the block, to an `ApiError`.

    Any other exception is a bug of this program: it passes through and becomes a 500.

    Args:
        param: The field that is wrong, if the error does not say.
        fields: From a parameter to the field with its value, where the names differ.
        explain: Makes an error of a request one that its sender understands; None leaves all as they are.
    """
    try:
        yield
    except RequestError as problem:
        said = problem if explain is None else explain(problem)
        message, name = str(said), said.param or param or ""
        field = fields.get(name, name)
        if name and re.match(rf"{re.escape(name)}\b", message):
            message = field + message.removeprefix(name)
        raise ApiError(400, message, param=field or None, code=said.code) from problem
    except EngineDeadError as problem:
        raise ApiError(503, "the engine has ended, and this request with it", code="engine_dead") from problem


def as_api_error(problem: Exception) -> ApiError:
    """The error to report for any exception; an unexpected one is logged and reported without details."""
    if isinstance(problem, ApiError):
        return problem
    logger.error("a request failed", exc_info=problem)
    return ApiError(500, INTERNAL_ERROR)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error answer of the application OpenAI's body."""
    app.exception_handler(ApiError)(_on_api_error)
    app.exception_handler(RequestValidationError)(_on_invalid_body)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(ClientDisconnectedError)(_on_disconnect)
    app.exception_handler(Exception)(_on_unforeseen)


async def _on_api_error(_request: Request, problem: ApiError) -> Response:
    return problem.response()


async def _on_unforeseen(_request: Request, _problem: Exception) -> Response:
    return ApiError(500, INTERNAL_ERROR).response()  # Starlette then raises the exception again, and it is logged


async def _on_disconnect(_request: Request, _problem: ClientDisconnectedError) -> Response:
    return ApiError(CLIENT_CLOSED_REQUEST, "the client has gone").response()


async def _on_http_exception(request: Request, problem: HTTPException) -> Response:
    path = _printable(request.url.path)[:MAX_PATH_CHARS]
    if problem.status_code == 404:
        return ApiError(404, no_such_route(request.app, path), code="unknown_url").response()
    if problem.status_code == 405:
        allowed = allowed_methods(request.app, request.url.path)
        message = f"{request.method} is not allowed at {path}; use {' or '.join(allowed)}"
        return ApiError(405, message, code="method_not_allowed").response({"allow": ", ".join(allowed)})
    return ApiError(problem.status_code, str(problem.detail)).response(problem.headers)


async def _on_invalid_body(_request: Request, problem: RequestValidationError) -> Response:
    return invalid_body(problem.errors()).response()


def invalid_body(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for a body that pydantic refused: the first few problems, each with its field."""
    texts = list(dict.fromkeys(_problem_text(problem) for problem in problems))
    if len(texts) > MAX_PROBLEMS_SHOWN:
        texts[MAX_PROBLEMS_SHOWN:] = [f"and {len(texts) - MAX_PROBLEMS_SHOWN} more"]
    places = [_place(problem) for problem in problems]
    code = problems[0].get("ctx", {}).get("code") if problems else None
    return ApiError(400, "; ".join(texts), param=places[0] if places and places[0] else None, code=code)


def _problem_text(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem.get('ctx', {}).get('error', 'it cannot be read')}"
    place = _dotted(problem["loc"][1:])
    if not place and problem["type"] == "missing":
        return "there is no body; one in JSON is expected"
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in ("model_attributes_type", "model_type"):
        text = "a JSON object is expected" if place else "the body must be a JSON object"
    # Messages about a parameter begin with its name.
    return text if not place or text.startswith(place) else f"{place}: {text}"


def _place(problem: Mapping[str, Any]) -> str:
    """Dotted path of the field that is wrong; empty for the body as a whole."""
    if problem["type"] == "json_invalid":
        return ""
    # Of a field that may not be there pydantic only knows where it would be.
    context = problem.get("ctx", {})
    extra = context.get("field") or getattr(context.get("error"), "param", None)
    return _dotted(problem["loc"][1:] if extra is None else (*problem["loc"][1:], extra))


def _dotted(place: Sequence[object]) -> str:
    """A path without the "<names>" of union members."""
    return ".".join(str(part) for part in place if not str(part).startswith("<"))


def _printable(text: str) -> str:
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= MAX_MESSAGE_CHARS else clean[:MAX_MESSAGE_CHARS] + "..."
