"""/v1/messages: Anthropic's Messages API, translated to chat completions.

`message_chat.py` translates requests, `message_events.py` answers, `message_errors.py` errors.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import RequestOutput
from nanoflow.server.answers import answer_of, beside
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.errors import json_response, user_errors
from nanoflow.server.generation import count_usage
from nanoflow.server.late_system import with_shown_system
from nanoflow.server.message_bodies import MessageBody, MessageError, MessageUsage, TokenCount
from nanoflow.server.message_chat import NAMES, chat_fields
from nanoflow.server.message_errors import PATH, message_error_of
from nanoflow.server.message_events import MessageContent, StreamEvent, stop_reason
from nanoflow.server.message_fields import MessageCountRequest, MessageRequest
from nanoflow.server.protocol import ChatCompletionRequest
from nanoflow.server.service import Service
from nanoflow.server.streaming import EVENT_STREAM_CONTENT, Ending, named_event, open_stream, while_connected
from nanoflow.server.turn import Piece, Turn, begin_turn, by_names, read_chat

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": MessageError, "description": "The request is refused"},
    503: {"model": MessageError, "description": "The engine does not run"},
}
_ENDING = Ending(failed=lambda problem: named_event(dict(message_error_of(problem))))


def messages_router(service: Service) -> APIRouter:
    """The routes of messages."""
    router = APIRouter(tags=["messages"], responses=_ERRORS, route_class=BodyRoute)
    made = {**_ERRORS, 200: {"model": MessageBody, "content": EVENT_STREAM_CONTENT}}

    @router.post(PATH, responses=made)
    async def create_message(body: MessageRequest, request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events."""
        deadline_s = service.deadline_s(request)
        with by_names(NAMES):
            chat = await beside(_chat, service, body)
            turn = await begin_turn(service, chat, request, deadline_s)
        making = _Making(service=service, turn=turn)
        if body.stream:
            return await open_stream(request.receive, making.events(), deadline_s, _ENDING)
        return await while_connected(request.receive, answer_of(making.answer()), deadline_s)

    @router.post(f"{PATH}/count_tokens", response_model=TokenCount)
    async def count_tokens(body: MessageCountRequest, request: Request) -> Response:
        """Count the tokens of a prompt."""
        service.check_model(body.model)
        with by_names(NAMES):
            chat = await beside(_chat, service, body)
            encode = service.encode_chat(chat.messages, chat, add_special_tokens=None)
            tokens = await while_connected(request.receive, encode, service.deadline_s(request))
        answer: TokenCount = {"input_tokens": len(tokens)}
        return json_response(answer)

    return router


def _chat(service: Service, body: MessageCountRequest) -> ChatCompletionRequest:
    fields = with_shown_system(service, chat_fields(body, takes_effort=_takes_effort(service, body)))
    return read_chat(service, fields, generates=isinstance(body, MessageRequest))


def _takes_effort(service: Service, body: MessageCountRequest) -> bool:
    """True if the chat template has a variable for the reasoning effort."""
    tokenizer = service.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        return True
    with user_errors("messages"):
        return "reasoning_effort" in tokenizer.chat_templates.get(None, has_tools=bool(body.tools)).text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Making:
    """A message that is being made.

    Attributes:
        content: Its blocks so far.
    """

    service: Service
    turn: Turn
    message_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    content: MessageContent = field(default_factory=MessageContent)

    async def answer(self) -> MessageBody:
        """Generate the whole message."""
        with by_names(NAMES):
            async with aclosing(self.turn.pieces(streams=False)) as pieces:
                async for piece in pieces:
                    self.content.push(piece.events)
                    last = piece
        self.content.finish()
        message = self._message(await self._usage(last.output))
        message["content"] = self.content.blocks
        message["stop_reason"], message["stop_sequence"] = _stopped(last)
        return message

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Answer piece by piece."""
        is_first = True
        with by_names(NAMES):
            async with aclosing(self.turn.pieces(streams=True)) as pieces:
                async for piece in pieces:
                    events = self._opening(piece.output) if is_first else []
                    events += self.content.push(piece.events)
                    if events:
                        yield _encoded(events)
                    is_first, last = False, piece
        reason, sequence = _stopped(last)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        closing = self.content.finish()
        usage = await self._usage(last.output)
        ending: list[StreamEvent] = [
            {"type": "message_delta", "delta": delta, "usage": usage},
            {"type": "message_stop"},
        ]
        yield _encoded([*closing, *ending])

    def _opening(self, output: RequestOutput) -> list[StreamEvent]:
        return [{"type": "message_start", "message": self._message(_usage_of(output))}, {"type": "ping"}]

    async def _usage(self, output: RequestOutput) -> MessageUsage:
        """Token counts of the finished message."""
        usage, thinking = _usage_of(output), self.content.thinking
        if thinking:
            count = len(await self.service.encode(thinking, add_special_tokens=False))
            usage["output_tokens_details"] = {"thinking_tokens": min(count, usage["output_tokens"])}
        return usage

    def _message(self, usage: MessageUsage) -> MessageBody:
        """The message without content."""
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.service.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


def _stopped(last: Piece) -> tuple[str, str | None]:
    """Why a message ended, and the stop sequence that ended it."""
    reason = stop_reason(last.finish_reason or "", last.stop_sequence)
    return reason, last.stop_sequence if reason == "stop_sequence" else None


def _usage_of(output: RequestOutput) -> MessageUsage:
    usage = count_usage([output])
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _encoded(events: Iterable[StreamEvent]) -> bytes:
    return b"".join(map(named_event, events))
