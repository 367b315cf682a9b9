"""POST /v1/chat/completions: the assistant's next turn in a conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response

from nanoflow.outputs import CompletionOutput, RequestOutput
from nanoflow.server.answers import answer_of, beside, made
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.errors import ERROR_RESPONSES
from nanoflow.server.generation import Call, Cursor, Delta, count_usage
from nanoflow.server.logprobs import chat_logprobs, prompt_logprobs
from nanoflow.server.protocol import ChatCompletionRequest
from nanoflow.server.reading import Found, MessageReader, Reading, found_in
from nanoflow.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from nanoflow.server.service import Service
from nanoflow.server.streaming import EVENT_STREAM_CONTENT, EventTemplate, event, open_stream, while_connected
from nanoflow.server.turn import begin_turn


def chat_router(service: Service) -> APIRouter:
    """The route of chat completions."""
    router = APIRouter(tags=["generate"], route_class=BodyRoute)
    responses = {**ERROR_RESPONSES, 200: {"model": ChatCompletionResponse, "content": EVENT_STREAM_CONTENT}}

    @router.post("/v1/chat/completions", responses=responses)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events."""
        deadline_s = service.deadline_s(request)
        turn = await begin_turn(service, body, request, deadline_s)
        chat = _Chat(service=service, body=body, call=turn.call, reading=turn.reading)
        if body.stream:
            return await open_stream(request.receive, chat.events(), deadline_s)
        return await while_connected(request.receive, answer_of(chat.answer()), deadline_s)

    return router


@dataclass(slots=True, kw_only=True)
class _ShownChoice:
    """How much of one choice was sent.

    Attributes:
        cursor: Position in its completion.
        reader: Finds calls and reasoning in its text; None if all of it is content.
        template: The template of its events that have only text, once there is one.
    """

    cursor: Cursor = field(default_factory=Cursor)
    reader: MessageReader | None
    template: EventTemplate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    """One call of the route."""

    service: Service
    body: ChatCompletionRequest
    call: Call
    reading: Reading | None

    async def answer(self) -> ChatCompletionResponse:
        """Generate all completions, then answer."""
        (output,) = await self.call.outputs()
        return await beside(self._answer, output)

    def _answer(self, output: RequestOutput) -> ChatCompletionResponse:
        response: ChatCompletionResponse = {
            "id": self.call.call_id,
            "object": "chat.completion",
            "created": self.call.created,
            "model": self.service.model_name,
            "system_fingerprint": self.service.fingerprint,
            "choices": self._choices(output),
            "usage": count_usage([output]),
            "prompt_token_ids": output.prompt_token_ids if self.body.return_token_ids else None,
            "prompt_logprobs": None,
        }
        if self.body.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self.service)
        return response

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Answer piece by piece: for each choice its role first, then its text."""
        shown: dict[int, _ShownChoice] = {}
        last: list[RequestOutput] = []
        async with aclosing(self.call.news()) as news:
            async for _, output in news:
                last = [output]
                events = [await self._events(output, completion, shown) for completion in output.outputs]
                if any(events):
                    yield b"".join(events)
        if self.body.has_usage_chunk:
            yield event(self._chunk([], count_usage(last)))

    async def _events(
        self, output: RequestOutput, completion: CompletionOutput, shown: dict[int, _ShownChoice]
    ) -> bytes:
        """The events for what is new in a completion; empty if there is nothing new."""
        index = completion.index
        state = shown.get(index)
        if state is None:
            state = shown[index] = _ShownChoice(reader=self._new_reader())
        delta = state.cursor.advance(completion)
        if delta is None:
            return b""
        usage = count_usage([output]) if self.body.has_continuous_usage else None
        opening = self._opening(index, output, is_first=len(shown) == 1) if delta.is_first else b""
        found = found_in(delta, state.reader)
        if delta.is_plain and usage is None and not self.body.return_token_ids:
            if found.is_empty and state.reader is not None:
                return opening
            if found.is_content:
                if state.template is None:
                    state.template = EventTemplate(
                        lambda text: self._chunk([self._chunk_choice(index, delta, Found(content=text))], None)
                    )
                return opening + state.template.fill(found.content)
        chunk = await made(
            lambda: event(self._chunk([self._chunk_choice(index, delta, found)], usage)), delta.num_entries
        )
        return opening + chunk

    def _opening(self, index: int, output: RequestOutput, *, is_first: bool) -> bytes:
        """The events before the text of a choice: its role, and the echoed message."""
        usage = count_usage([output], is_completion_hidden=True) if self.body.has_continuous_usage else None
        chunk = self._chunk([_opening_choice(index, {"role": "assistant", "content": ""})], usage)
        if is_first and self.body.return_token_ids:
            chunk["prompt_token_ids"] = output.prompt_token_ids
        if not self.body.echoed:
            return event(chunk)
        return event(chunk) + event(self._chunk([_opening_choice(index, {"content": self.body.echoed})], usage))

    def _choices(self, output: RequestOutput) -> list[ChatChoice]:
        choices: list[ChatChoice] = []
        for completion in output.outputs:
            delta = Cursor().advance(completion)
            if delta is None:
                continue
            found = found_in(delta, self._new_reader())
            choices.append(
                {
                    "index": completion.index,
                    "message": found.message(self.body.echoed),
                    "logprobs": self._logprobs(delta),
                    "finish_reason": found.finish_reason,
                    "stop_reason": delta.stop_reason,
                    "token_ids": delta.token_ids if self.body.return_token_ids else None,
                }
            )
        return choices

    def _new_reader(self) -> MessageReader | None:
        return None if self.reading is None else self.reading.begin()

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        chunk: ChatCompletionChunk = {
            "id": self.call.call_id,
            "object": "chat.completion.chunk",
            "created": self.call.created,
            "model": self.service.model_name,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }
        if self.body.has_usage_chunk:
            chunk["usage"] = usage
        return chunk

    def _chunk_choice(self, index: int, delta: Delta, found: Found) -> ChatChunkChoice:
        choice: ChatChunkChoice = {
            "index": index,
            "delta": found.delta,
            "logprobs": self._logprobs(delta),
            "finish_reason": found.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if delta.logprobs is None:
            return None
        num_top = self.body.top_logprobs or 0
        return chat_logprobs(
            delta.token_ids,
            delta.logprobs,
            num_top=self.service.engine.facts.vocab_size if num_top == -1 else num_top,
            texts=self.service.texts(self.body),
        )


def _opening_choice(index: int, delta: ChatDelta) -> ChatChunkChoice:
    return {
        "index": index,
        "delta": delta,
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }
