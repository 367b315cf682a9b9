"""Answer the lines of a batch: a bounded number at once, each as a call of the server's own routes.

`Call` is what answers one body; `server/inside.py` has the one that runs the application. A line that is no request is
answered here, with the error that the server would give. Calls for which there is no room are made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from nanoflow.batch_files.lines import (
    OK,
    URLS,
    Answer,
    AnswerLine,
    LineError,
    RequestLine,
    answer_line,
    custom_id_of,
    read_request,
    refusal,
)
from nanoflow.batch_files.source import Line, Places
from nanoflow.option import ConfigError

Call = Callable[[str, bytes], Awaitable[Answer]]
"""Answers a body sent to a path."""

# Texts of lines that are held at once, whatever the number of lines.
MAX_HELD_BYTES = 128 * 2**20
_OVERLOADED, _UNAVAILABLE, _TOO_LONG = 429, 503, 413
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0


class UnavailableError(Exception):
    """The engine does not answer any more; the line that was asked stays without an answer."""


class Sink(Protocol):
    """Where answers go; `answers.py` has the file."""

    def append(self, number: int, line: AnswerLine) -> bool:
        """Take the answer to a line."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """What has been answered.

    Attributes:
        num_completed: Lines answered with status 200.
        num_failed: Lines answered with another status.
        num_prompt_tokens, num_completion_tokens: As the answers say.
    """

    num_completed: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    @property
    def num_answered(self) -> int:
        """All lines."""
        return self.num_completed + self.num_failed

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        if answer.status_code != OK:
            self.num_failed += 1
            return
        self.num_completed += 1
        usage = _usage_of(answer.body)
        self.num_prompt_tokens += usage.prompt_tokens
        self.num_completion_tokens += usage.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """How the lines of a batch are answered.

    Attributes:
        call: Answers one request.
        sink: Where answers go.
        repeated: Numbers of the lines whose custom_id a line before them has.
        num_at_once: Most requests that are under way.
        urls: Routes that a line may name.
        on_answer: Is called after every answer.
        counts: Of the answers so far.
    """

    call: Call
    sink: Sink
    repeated: Places
    num_at_once: int
    urls: tuple[str, ...] = URLS
    on_answer: Callable[[Counts], None] = field(default=lambda _counts: None)
    counts: Counts = field(default_factory=Counts)

    async def run(self, lines: Iterator[Line]) -> None:
        """Answer all lines, each as soon as one of `num_at_once` places is free.

        Raises:
            UnavailableError: The engine has ended. Requests under way are dropped; answers so far are in the sink.
            ConfigError: The input has changed.
            OSError: The sink cannot take more.
        """
        held = _Held(MAX_HELD_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.num_at_once):
                    group.create_task(self._work(lines, held))
        except* (UnavailableError, ConfigError, OSError) as problems:
            raise _first_of(problems) from None

    async def _work(self, lines: Iterator[Line], held: _Held) -> None:
        while True:
            await held.room()
            line = next(lines, None)
            if line is None:
                return
            with held.hold(len(line.text or b"")):
                custom_id, answer = await self._answer(line)
            if self.sink.append(line.number, answer_line(line.number, custom_id, answer)):
                self.counts.add(answer)
                self.on_answer(self.counts)

    async def _answer(self, line: Line) -> tuple[str | None, Answer]:
        """The answer to a line and its custom_id."""
        if line.text is None:
            await asyncio.sleep(0)
            return None, refusal(LineError("the line is longer than a request may be", code="too_long"), _TOO_LONG)
        try:
            request = read_request(line.text, self.urls)
            if line.number in self.repeated:
                raise LineError(
                    f"custom_id {request.custom_id!r} is that of a line before; each line needs its own",
                    custom_id=request.custom_id,
                    param="custom_id",
                    code="duplicate_custom_id",
                )
            if _streams(request):
                message = "stream must be false: the answers of a batch are whole"
                raise LineError(message, custom_id=request.custom_id, param="stream", code="invalid_body")
        except LineError as problem:
            await asyncio.sleep(0)  # many bad lines in a row must not stop everything else
            return problem.custom_id or custom_id_of(line.text), refusal(problem)
        return request.custom_id, await self._call(request)

    async def _call(self, request: RequestLine) -> Answer:
        """The answer of the route, asked again while there is no room."""
        wait_s = _FIRST_WAIT_S
        while True:
            answer = await self.call(request.url, bytes(request.body))
            is_full = answer.status_code == _OVERLOADED
            if answer.status_code == _UNAVAILABLE:
                error = error_of(answer)
                if error.code != "overloaded":
                    raise UnavailableError(error.message)
                is_full = True
            if not is_full:
                return answer
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


class _Held:
    """Bounds the bytes of lines that are held at once; one line may always be held."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._changed = asyncio.Event()

    async def room(self) -> None:
        while self._size > self._most:
            self._changed.clear()
            await self._changed.wait()

    def hold(self, size: int) -> _Hold:
        self._size += size
        return _Hold(self, size)

    def give_back(self, size: int) -> None:
        self._size -= size
        self._changed.set()


class _Hold:
    def __init__(self, held: _Held, size: int) -> None:
        self._held, self._count = held, size

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._held.give_back(self._count)


class _Error(msgspec.Struct):
    message: str = "the engine does not answer"
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answered(msgspec.Struct):
    usage: _Usage = msgspec.field(default_factory=_Usage)


class _Stream(msgspec.Struct):
    stream: bool | None = None


_answered, _error_bodies = msgspec.json.Decoder(_Answered), msgspec.json.Decoder(_ErrorBody)
_stream = msgspec.json.Decoder(_Stream)


def error_of(answer: Answer) -> _Error:
    """The error of an answer that is none of success."""
    try:
        return _error_bodies.decode(bytes(answer.body)).error
    except msgspec.DecodeError:
        return _Error()


def _usage_of(body: msgspec.Raw) -> _Usage:
    try:
        return _answered.decode(bytes(body)).usage
    except msgspec.DecodeError:
        return _Usage()


def _streams(request: RequestLine) -> bool:
    """True if a body asks for a stream; one that cannot be read is refused by the route."""
    try:
        return _stream.decode(bytes(request.body)).stream is True
    except (msgspec.DecodeError, RecursionError):
        return False


def _first_of(problems: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = problems
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
