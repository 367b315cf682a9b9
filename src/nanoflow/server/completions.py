"""POST /v1/completions: text that continues a prompt, or several prompts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from fastapi import APIRouter, Request, Response

from nanoflow.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanoflow.server.answers import answer_of, beside, made
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.echo import Echo, TextOffsets
from nanoflow.server.errors import ERROR_RESPONSES
from nanoflow.server.generation import Call, Cursor, Delta, count_usage, new_id
from nanoflow.server.logprobs import completion_logprobs, prompt_logprobs
from nanoflow.server.protocol import CompletionRequest
from nanoflow.server.responses import CompletionChoice, CompletionLogprobs, CompletionResponse, Usage
from nanoflow.server.service import Service
from nanoflow.server.streaming import EVENT_STREAM_CONTENT, EventTemplate, event, open_stream, while_connected


def completions_router(service: Service) -> APIRouter:
    """The route of completions."""
    router = APIRouter(tags=["generate"], route_class=BodyRoute)
    responses = {**ERROR_RESPONSES, 200: {"model": CompletionResponse, "content": EVENT_STREAM_CONTENT}}

    @router.post("/v1/completions", responses=responses)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text; with `stream`, as server-sent events."""
        service.check_model(body.model)
        params, call_id = service.sampling(body), new_id("cmpl")
        trace = service.trace("text_completion", request, params, call_id)
        prompts, deadline_s = body.prompts, service.deadline_s(request)
        service.admission.check(len(prompts) * params.n)
        if body.changes_tokens:
            reading = service.prompt_token_ids(prompts, body, params.max_tokens)
            prompts = await while_connected(request.receive, reading, deadline_s)
        call = Call(
            engine=service.engine,
            prompts=prompts,
            params=params,
            doors=service,
            cache_salt=service.cache_salt(request, body.cache_salt),
            session_id=service.session_id(request, body.session_id),
            priority=body.priority_in(request.scope),
            call_id=call_id,
            trace=trace,
            field_names=body.field_names,
        )
        completion = _Completion(service=service, body=body, call=call)
        if body.stream:
            return await open_stream(request.receive, completion.events(), deadline_s)
        return await while_connected(request.receive, answer_of(completion.answer()), deadline_s)

    return router


@dataclass(slots=True, kw_only=True)
class _ShownChoice:
    """How much of one choice was sent.

    Attributes:
        cursor: Position in its completion.
        offsets: Counts where its tokens begin; None before log probabilities were sent.
        template: Template of its events that have only text, once there is one.
    """

    cursor: Cursor = field(default_factory=Cursor)
    offsets: TextOffsets | None = None
    template: EventTemplate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Completion:
    """One call of the route."""

    service: Service
    body: CompletionRequest
    call: Call

    async def answer(self) -> CompletionResponse:
        """Generate all completions, then answer."""
        return await beside(self._answer, await self.call.outputs())

    def _answer(self, outputs: Sequence[RequestOutput]) -> CompletionResponse:
        choices = [
            self._choice(output, self.call.choice_index(index, completion), delta, _ShownChoice())
            for index, output in enumerate(outputs)
            for completion in output.outputs
            if (delta := Cursor().advance(completion)) is not None
        ]
        for choice in choices:
            places = outputs[choice["index"] // self.call.params.n].prompt_logprobs or []
            is_asked = self.body.prompt_logprobs is not None
            choice["prompt_logprobs"] = prompt_logprobs(places, self.service) if is_asked else None
            choice.setdefault("token_ids", None)
            choice.setdefault("prompt_token_ids", None)
        return self._response(choices, self._usage(outputs))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Answer piece by piece."""
        shown: dict[int, _ShownChoice] = {}
        last: dict[int, RequestOutput] = {}
        async with aclosing(self.call.news()) as news:
            async for index, output in news:
                last[index] = output
                usage = self._usage(last.values()) if self.body.has_continuous_usage else None
                events = [await self._event(index, output, completion, shown, usage) for completion in output.outputs]
                if any(events):
                    yield b"".join(events)
        if self.body.has_usage_chunk:
            yield event(self._response([], self._usage(last.values())))

    async def _event(
        self,
        index: int,
        output: RequestOutput,
        completion: CompletionOutput,
        shown: dict[int, _ShownChoice],
        usage: Usage | None,
    ) -> bytes:
        """The event for what is new in a completion of prompt `index`; empty if there is nothing new."""
        place = self.call.choice_index(index, completion)
        state = shown.get(place)
        if state is None:
            state = shown[place] = _ShownChoice()
        delta = state.cursor.advance(completion)
        if delta is None:
            return b""
        if delta.is_plain and usage is None and not self._varies(delta):
            if state.template is None:
                state.template = EventTemplate(
                    lambda text: self._response([self._choice(output, place, delta.with_text(text), state)], None)
                )
            return state.template.fill(delta.text)
        num_echoed = len(output.prompt_token_ids) if self.body.echo and delta.is_first else 0
        num_entries = delta.num_entries + num_echoed * (2 + max(self.body.logprobs or 0, 0))
        return await made(partial(self._chunk, output, place, delta, state, usage), num_entries)

    def _chunk(
        self, output: RequestOutput, place: int, delta: Delta, state: _ShownChoice, usage: Usage | None
    ) -> bytes:
        return event(self._response([self._choice(output, place, delta, state)], usage))

    def _varies(self, delta: Delta) -> bool:
        """True if the event of this delta differs from the template in more than its text."""
        body = self.body
        return body.is_echo_only or bool(body.echo and delta.is_first) or body.return_token_ids is True

    def _usage(self, outputs: Iterable[RequestOutput]) -> Usage:
        return count_usage(outputs, is_completion_hidden=self.body.is_echo_only)

    def _response(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
        response: CompletionResponse = {
            "id": self.call.call_id,
            "object": "text_completion",
            "created": self.call.created,
            "model": self.service.model_name,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }
        if usage is not None or self.body.has_usage_chunk:
            response["usage"] = usage
        return response

    def _choice(self, output: RequestOutput, place: int, delta: Delta, shown: _ShownChoice) -> CompletionChoice:
        """What is new in a choice, after the echoed prompt if this is the first event of the choice."""
        echo = self._echo(output) if self.body.echo and delta.is_first else None
        text = "" if self.body.is_echo_only else delta.text
        choice: CompletionChoice = {
            "index": place,
            "text": text if echo is None else echo.text + text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(output, echo, delta, shown),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = [] if self.body.is_echo_only else delta.token_ids
            if delta.is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _echo(self, output: RequestOutput) -> Echo:
        has_offsets = self.body.logprobs is not None
        return self.service.echo(output, is_continued=not self.body.is_echo_only, has_offsets=has_offsets)

    def _logprobs(
        self, output: RequestOutput, echo: Echo | None, delta: Delta, shown: _ShownChoice
    ) -> CompletionLogprobs:
        if shown.offsets is None:
            start = 0 if echo is None else len(echo.text)
            shown.offsets = self.service.completion_offsets(output, self.call.params, start)
        token_ids: list[int] = []
        places: Sequence[PositionLogprobs | None] = []
        text_offsets: list[int] = []
        if echo is not None:
            token_ids, places, text_offsets = output.prompt_token_ids, output.prompt_logprobs or [], echo.text_offsets
        if not self.body.is_echo_only:
            token_ids, places = [*token_ids, *delta.token_ids], [*places, *(delta.logprobs or [])]
            text_offsets = [*text_offsets, *shown.offsets.take(delta.token_ids)]
        return completion_logprobs(token_ids, places, text_offsets=text_offsets, texts=self.service.texts(self.body))
