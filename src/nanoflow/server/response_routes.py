"""/v1/responses: OpenAI's Responses API, translated to chat completions, and the responses that are kept.

`response_chat.py` translates requests, `response_events.py` answers; `response_store.py` keeps them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Query, Request, Response

from nanoflow.outputs import FinishReason, RequestOutput
from nanoflow.server.answers import answer_of, beside
from nanoflow.server.batches import Limit, owner_of, page
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.errors import ERROR_RESPONSES, ApiError, json_response
from nanoflow.server.generation import count_usage
from nanoflow.server.late_system import with_shown_system
from nanoflow.server.response_bodies import DeletedResponse, InputItems, ResponseBody, ResponseUsage, Status
from nanoflow.server.response_chat import NAMES, Item, chat_fields, input_items, new_response_id
from nanoflow.server.response_events import ResponseOutput, StreamEvent
from nanoflow.server.response_fields import ResponseRequest
from nanoflow.server.response_store import KeptResponse, ResponseStore
from nanoflow.server.service import Service
from nanoflow.server.streaming import EVENT_STREAM_CONTENT, Ending, named_event, open_stream, while_connected
from nanoflow.server.turn import Turn, begin_turn, by_names, read_chat

_KEEPS_NONE = "this server keeps no responses (--max-kept-responses)"
_ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


def responses_router(service: Service, store: ResponseStore | None) -> APIRouter:
    """The routes of responses; without a store none is kept."""
    router = APIRouter(tags=["responses"], responses=ERROR_RESPONSES, route_class=BodyRoute)
    made = {**ERROR_RESPONSES, 200: {"model": ResponseBody, "content": EVENT_STREAM_CONTENT}}

    @router.post("/v1/responses", responses=made)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events."""
        deadline_s = service.deadline_s(request)
        making = await _begun(service, store, body, request, deadline_s)
        if body.stream:
            ending = Ending(failed=making.failed)
            return await open_stream(request.receive, making.events(), deadline_s, ending)
        return await while_connected(request.receive, answer_of(making.answer()), deadline_s)

    @router.get("/v1/responses/{response_id}", response_model=ResponseBody)
    async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
        """A response that is kept."""
        if stream:
            message = "stream: a kept response is sent as a whole; only those in the background can be streamed again"
            raise ApiError(400, message, param="stream")
        return json_response((await _kept(service, store, response_id, request)).response)

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> DeletedResponse:
        """Forget a response. Those that go on from it cannot be gone on from any more."""
        is_gone = store is not None and await beside(store.delete, response_id, owner_of(service, request))
        if not is_gone:
            raise _unknown(response_id, store)
        return {"id": response_id, "object": "response.deleted", "deleted": True}

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(response_id: str, request: Request) -> Response:
        """Refused: only responses in the background can be cancelled, and there are none."""
        await _kept(service, store, response_id, request)
        message = "only responses in the background can be cancelled, and this server makes none; close the connection"
        raise ApiError(400, message, param="response_id")

    @router.get("/v1/responses/{response_id}/input_items", response_model=InputItems)
    async def list_input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: Limit = 20,
        order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    ) -> Response:
        """The items of a response's own input, the last first; those of earlier responses are not among them."""
        kept = await _kept(service, store, response_id, request)
        items = kept.input if order == "asc" else kept.input[::-1]
        ids = [item["id"] for item in items]
        start = ids.index(after) + 1 if after in ids else 0
        return json_response(page(items[start : start + limit + 1], limit))

    return router


async def _kept(service: Service, store: ResponseStore | None, response_id: str, request: Request) -> KeptResponse:
    """A kept response of the caller (404 if there is none)."""
    found = None if store is None else await beside(store.find, response_id, owner_of(service, request))
    if found is None:
        raise _unknown(response_id, store)
    return found


def _unknown(response_id: str, store: ResponseStore | None) -> ApiError:
    why = "it never was (store), it was deleted, or it was dropped for newer ones" if store else _KEEPS_NONE
    return ApiError(404, f"the response {response_id[:100]!r} is not kept here: {why}", code="response_not_found")


async def _begun(
    service: Service, store: ResponseStore | None, body: ResponseRequest, request: Request, deadline_s: float | None
) -> _Making:
    """Translate a request and begin its turn."""
    if store is None and body.store:
        raise ApiError(400, f"store: {_KEEPS_NONE}", param="store")
    owner = owner_of(service, request)
    before: list[Item] = []
    if body.previous_response_id is not None:
        if store is None:
            message = f"previous_response_id: {_KEEPS_NONE}"
            raise ApiError(404, message, param="previous_response_id", code="previous_response_not_found")
        most = service.config.max_body_bytes
        before = await beside(store.conversation, body.previous_response_id, owner, max_bytes=most)

    def translated() -> tuple[list[Item], Any]:
        own = input_items(body)
        return own, read_chat(service, with_shown_system(service, chat_fields(body, [*before, *own])))

    with by_names(NAMES):
        own, chat = await beside(translated)
        turn = await begin_turn(service, chat, request, deadline_s)
    return _Making(
        service=service,
        store=None if body.store is False else store,
        body=body,
        owner=owner,
        own=own,
        turn=turn,
    )


@dataclass(slots=True, kw_only=True)
class _Making:
    """A response that is being made.

    Attributes:
        store: Where it is kept; None if it is not.
        owner: Who may see it.
        own: The items of its own input.
        output: Its items so far.
        num_events: Events that were sent.
    """

    service: Service
    store: ResponseStore | None
    body: ResponseRequest
    owner: str
    own: list[Item]
    turn: Turn
    response_id: str = field(default_factory=new_response_id)
    output: ResponseOutput = field(default_factory=ResponseOutput)
    num_events: int = 0

    async def answer(self) -> ResponseBody:
        """Generate the whole response."""
        with by_names(NAMES):
            async with aclosing(self.turn.pieces(streams=False)) as pieces:
                async for piece in pieces:
                    self.output.push(piece.events)
                    last = piece
            self.output.finish(is_cut=last.finish_reason == FinishReason.LENGTH)
        return await self._ended(last.output, last.finish_reason)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Answer piece by piece."""
        with by_names(NAMES):
            async with aclosing(self.turn.pieces(streams=True)) as pieces:
                async for piece in pieces:
                    events = self._opening() if self.num_events == 0 else []
                    events += self.output.push(piece.events)
                    if piece.finish_reason is not None:
                        events += self.output.finish(is_cut=piece.finish_reason == FinishReason.LENGTH)
                    if events:
                        yield self._sent(events)
                    last = piece
        response = await self._ended(last.output, last.finish_reason)
        yield self._sent([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, problem: ApiError) -> bytes:
        """The event for a failure in the middle of a stream."""
        code = _ERROR_CODES.get(problem.status, "server_error")
        response = self._response("failed")
        response["output"], response["error"] = self.output.items, {"code": code, "message": problem.message}
        return self._sent([{"type": "response.failed", "response": response}])

    def _opening(self) -> list[StreamEvent]:
        response = self._response("in_progress")
        return [{"type": f"response.{kind}", "response": response} for kind in ("created", "in_progress")]

    def _sent(self, events: Iterable[StreamEvent]) -> bytes:
        """Events with their numbers, encoded."""
        encoded = []
        for event in events:
            encoded.append(named_event({**event, "sequence_number": self.num_events}))
            self.num_events += 1
        return b"".join(encoded)

    async def _ended(self, output: RequestOutput, finish_reason: str | None) -> ResponseBody:
        """The response at its end; it is kept if it shall be."""
        is_cut = finish_reason == FinishReason.LENGTH
        response = self._response("incomplete" if is_cut else "completed")
        response["output"] = self.output.items
        response["completed_at"] = None if is_cut else int(time.time())
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["usage"] = await self._usage(output)
        if self.store is not None:
            kept = KeptResponse(
                id=self.response_id,
                owner=self.owner,
                previous_id=self.body.previous_response_id,
                input=self.own,
                response=cast(dict[str, Any], response),
            )
            response["store"] = await beside(self.store.keep, kept)
        return response

    async def _usage(self, output: RequestOutput) -> ResponseUsage:
        usage, num_reasoning = count_usage([output]), 0
        if reasoning := self.output.reasoning:
            num_reasoning = len(await self.service.encode(reasoning, add_special_tokens=False))
        num_output = usage["completion_tokens"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": min(num_reasoning, num_output)},
            "total_tokens": usage["total_tokens"],
        }

    def _response(self, status: Status) -> ResponseBody:
        """The response without what is known only at its end."""
        body, params = self.body, self.turn.call.params
        text_format = None if body.text is None else body.text.format
        choice = body.tool_choice or "auto"
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.turn.call.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.service.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": self.store is not None,
            "temperature": params.temperature,
            "text": {"format": text_format or {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }
