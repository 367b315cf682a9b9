"""A turn of the assistant: from the body of a chat completion to a call of the engine, and what comes back as events.

All routes that answer conversations use it; `/v1/responses` and `/v1/messages` translate their bodies to chats first.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from nanoflow.chat_formats.events import Event
from nanoflow.chat_formats.grammar import blamed
from nanoflow.outputs import FinishReason, RequestOutput
from nanoflow.request import RequestError
from nanoflow.server.errors import ApiError, invalid_body
from nanoflow.server.generation import Call, Cursor, new_id
from nanoflow.server.protocol import ChatCompletionRequest
from nanoflow.server.reading import Reading, after_prompt, found_in, params_for, reading_of, with_form
from nanoflow.server.service import Service
from nanoflow.server.streaming import while_connected
from nanoflow.structured import Structured

Names = Sequence[tuple[str, str]]
"""Regular expressions of fields of a chat completion, and the fields of another body that they come from."""
# What may follow the name of a field, down to a field of its value.
_INSIDE = re.compile(r"(\.\w+|\[\d+\])*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new in the message of a turn.

    Attributes:
        events: Its new content, reasoning and calls, in the order of the text.
        finish_reason: Why the message ended, as chat completions say it; None if it has not.
        stop_sequence: The stop string that ended it; None if none did.
        output: The output of the engine so far.
    """

    events: Sequence[Event]
    finish_reason: str | None
    stop_sequence: str | None
    output: RequestOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn that the engine can be asked for.

    Attributes:
        body: The body of the chat completion.
        call: The call of the engine.
        reading: How the message is read; None if its whole text is content.
    """

    body: ChatCompletionRequest
    call: Call
    reading: Reading | None

    async def pieces(self, *, streams: bool) -> AsyncGenerator[Piece, None]:
        """The only message of the turn, piece by piece, or in one piece.

        Args:
            streams: False yields the whole message at its end.

        Raises:
            ApiError: As `Call.news`; also if the request was aborted (503).
        """
        cursor, reader = Cursor(), None if self.reading is None else self.reading.begin()
        async with aclosing(self.call.news(streams=streams)) as news:
            async for _, output in news:
                delta = cursor.advance(output.outputs[0])
                if delta is None:
                    continue
                found = found_in(delta, reader)
                if delta.finish_reason is FinishReason.ABORT:
                    raise ApiError(503, "the request was aborted before its end", code="aborted")
                stop = delta.stop_reason if isinstance(delta.stop_reason, str) else None
                yield Piece(events=found.events, finish_reason=found.finish_reason, stop_sequence=stop, output=output)


async def begin_turn(service: Service, body: ChatCompletionRequest, request: Request, deadline_s: float | None) -> Turn:
    """Check the body of a chat completion, and make its prompt.

    Args:
        service: The served model.
        body: The body.
        request: The HTTP request that asks for it.
        deadline_s: When the call must have ended, on the event loop's clock; None for no limit.

    Raises:
        ApiError: The turn cannot be served (400, 404), there is no room (429), or the deadline has passed (504).
        ClientDisconnectedError: The client has disconnected.
    """
    service.check_model(body.model)
    params, call_id = service.sampling(body), new_id("chatcmpl")
    asked = params.structured_outputs
    trace = service.trace("chat", request, params, call_id)
    reading = reading_of(service, body, params)
    service.admission.check(params.n)
    encode = service.encode_chat(body.messages, body, add_special_tokens=body.add_special_tokens)
    token_ids = await while_connected(request.receive, encode, deadline_s)
    prompt = service.truncated(token_ids, body, params.max_tokens)
    if reading is not None:
        reading = after_prompt(reading, service, body, prompt)
        params = params_for(reading, service, body, params)
    call = Call(
        engine=service.engine,
        prompts=[with_form(prompt, reading, params)],
        params=params,
        doors=service,
        cache_salt=service.cache_salt(request, body.cache_salt),
        session_id=service.session_id(request, body.session_id),
        priority=body.priority_in(request.scope),
        call_id=call_id,
        trace=trace,
        field_names=_field_names(body),
        explain=partial(_explained, body, asked, params.structured_outputs),
    )
    return Turn(body=body, call=call, reading=reading)


def _field_names(body: ChatCompletionRequest) -> Mapping[str, str]:
    """Fields of the body by parameters; a shape that the body has not is that of calls of its tools."""
    return {"structured_outputs": "tools", **body.field_names}


def _explained(
    body: ChatCompletionRequest, asked: Structured | None, shape: Structured | None, problem: RequestError
) -> RequestError:
    """An error about the shape of the text, as one about the function whose schema is wrong, if that is so."""
    if shape is None or shape == asked or problem.param != "structured_outputs":
        return problem
    return blamed(shape.text, problem, body.tools or (), body.choice)


def read_chat(service: Service, fields: Mapping[str, Any], *, generates: bool = True) -> ChatCompletionRequest:
    """The body of a chat completion from its JSON, checked as if a client had sent it.

    Args:
        service: The served model, with its bounds.
        fields: The JSON; fields that are None count as not given.
        generates: Whether an answer is asked for, so that the prompt must fit in the context.

    Raises:
        ApiError: It is invalid (400), or asks for too much (400, 413).
    """
    given = {name: value for name, value in fields.items() if value is not None}
    service.call_bounds.check(given, generates=generates)
    try:
        return ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise invalid_body([{**problem, "loc": ("body", *problem["loc"])} for problem in problems]) from None


@contextmanager
def by_names(names: Names) -> Iterator[None]:
    """Errors in the block name the fields of the body that the client has sent, not those of a chat completion."""
    try:
        yield
    except ApiError as problem:
        param, message = problem.param and _renamed(problem.param, names), problem.message
        if problem.param and message.startswith(problem.param):
            inside = _INSIDE.match(message, len(problem.param))
            end = len(problem.param) if inside is None else inside.end()
            message = _renamed(message[:end], names) + message[end:]
        elif problem.param:
            message = message.replace(problem.param, param or "", 1)
        raise ApiError(problem.status, message, param=param, code=problem.code, headers=problem.headers) from problem


def _renamed(place: str, names: Names) -> str:
    return next((found.expand(to) for pattern, to in names if (found := re.match(pattern, place))), place)
