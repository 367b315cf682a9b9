"""One line of a batch: a request of the input file, and its answer in the output file, as OpenAI's batch API has them.

A request is {"custom_id", "method", "url", "body"}. An answer is {"id", "custom_id", "response": {"status_code",
"request_id", "body"}, "error"}; its `id` is `batch_req_` and the number of the request's line, from 1. So an output
file alone says which lines are answered, those without a usable custom_id too. Bodies are not looked at here:
`requests.py` runs them.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_CUSTOM_ID_CHARS = 512
OK, BAD_REQUEST = 200, 400
_ID_PREFIX = "batch_req_"


class LineError(ValueError):
    """A line that is no request.

    Attributes:
        custom_id: That of the line, if it has one that can be read.
        param: The field that is wrong; None for the line as a whole.
        code: A word to be read by programs.
    """

    def __init__(self, message: str, *, custom_id: str | None = None, param: str | None = None, code: str) -> None:
        super().__init__(message)
        self.custom_id = custom_id
        self.param = param
        self.code = code


class RequestLine(msgspec.Struct, frozen=True):
    """A request of the input file; `body` is its JSON as it was written."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a call has been answered with: HTTP status, id of the call, and the body in JSON."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class AnswerError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request has no response, such as `batch_cancelled`."""

    code: str
    message: str


class AnswerLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the output file."""

    id: str
    custom_id: str | None
    response: Answer | None
    error: AnswerError | None = None

    def encode(self) -> bytes:
        """The line, with its end."""
        return msgspec.json.encode(self) + b"\n"


class _Identity(msgspec.Struct):
    custom_id: str


class _Status(msgspec.Struct):
    status_code: int


class _Answered(msgspec.Struct):
    id: str
    response: _Status | None = None


_requests = msgspec.json.Decoder(RequestLine)
_identities = msgspec.json.Decoder(_Identity)
_answers = msgspec.json.Decoder(_Answered)


def read_request(line: bytes, urls: tuple[str, ...] = URLS) -> RequestLine:
    """The request of a line.

    Args:
        line: Without its end.
        urls: The routes that a request may name.

    Raises:
        LineError: It is no JSON object with these fields, or names another route.
    """
    try:
        request = _requests.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        is_shape = isinstance(problem, msgspec.ValidationError)
        what = "is no request" if is_shape else "is not valid JSON"
        code = "invalid_request" if is_shape else "invalid_json_line"
        raise LineError(f"the line {what}: {problem}", custom_id=custom_id_of(line), code=code) from None
    custom_id = request.custom_id
    if not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"custom_id must have 1 to {MAX_CUSTOM_ID_CHARS} characters, got {len(custom_id)}"
        raise LineError(message, param="custom_id", code="invalid_custom_id")
    if request.method != "POST":
        message = f"method must be POST, got {request.method[:20]!r}"
        raise LineError(message, custom_id=custom_id, param="method", code="invalid_method")
    if request.url not in urls:
        message = f"url must be {' or '.join(urls)}, got {request.url[:100]!r}"
        raise LineError(message, custom_id=custom_id, param="url", code="invalid_url")
    if bytes(request.body).lstrip()[:1] != b"{":
        raise LineError("body must be a JSON object", custom_id=custom_id, param="body", code="invalid_body")
    return request


def custom_id_of(line: bytes) -> str | None:
    """The custom_id of a line, whatever else is in it; None if there is none that can be used."""
    try:
        custom_id = _identities.decode(line).custom_id
        custom_id.encode()
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return custom_id if 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS else None


def answer_line(number: int, custom_id: str | None, answer: Answer) -> AnswerLine:
    """The line for the answer to line `number` of the input, counted from 1."""
    return AnswerLine(id=f"{_ID_PREFIX}{number}", custom_id=custom_id, response=answer)


def unanswered_line(number: int, custom_id: str | None, *, code: str, message: str) -> AnswerLine:
    """The line for a request that was not run."""
    error = AnswerError(code=code, message=message)
    return AnswerLine(id=f"{_ID_PREFIX}{number}", custom_id=custom_id, response=None, error=error)


def refusal(problem: LineError, status_code: int = BAD_REQUEST) -> Answer:
    """The answer to a line that is no request, in the shape of the server's errors."""
    return Answer(
        status_code=status_code,
        request_id=f"req-{uuid.uuid4().hex}",
        body=error_body(str(problem), param=problem.param, code=problem.code),
    )


def error_body(message: str, *, param: str | None = None, code: str | None = None) -> msgspec.Raw:
    """A body of an error, as the server makes it."""
    text = message.encode("utf-8", "replace").decode()
    error: dict[str, Any] = {"message": text, "type": "invalid_request_error", "param": param, "code": code}
    return msgspec.Raw(msgspec.json.encode({"error": error}))


def answered(line: bytes) -> tuple[int, bool]:
    """The line of the input that a line of the output answers, by its number, and whether with status 200.

    Raises:
        ValueError: It is no line of an output file.
    """
    try:
        found = _answers.decode(line)
    except (msgspec.DecodeError, UnicodeError) as problem:
        raise ValueError(f"it is no answer of a batch: {problem}") from None
    digits = found.id.removeprefix(_ID_PREFIX)
    if not (found.id.startswith(_ID_PREFIX) and digits.isascii() and digits.isdigit() and 0 < len(digits) < 16):
        raise ValueError(f"its id is {found.id[:40]!r}, and not that of a line of a batch")
    return int(digits), found.response is not None and found.response.status_code == OK
