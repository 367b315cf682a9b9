"""POST /v1/prefetch: advice that a request will come soon, after SYMPHONY (https://arxiv.org/abs/2412.16434).

Nothing is computed and no request waits. The pages that the device has count as used, so that they are not the next to
be taken, and lower tiers are asked for others. The answer says how much is there. `scheduler/reuse.py` does the work.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from nanoflow.engine.messages import PrefetchCounts
from nanoflow.engine.prompts import Prompt
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.errors import ERROR_RESPONSES, ApiError, json_response, user_errors
from nanoflow.server.metrics import ServerMetrics
from nanoflow.server.protocol import PrefetchRequest
from nanoflow.server.responses import PrefetchResponse
from nanoflow.server.service import Service
from nanoflow.server.streaming import while_connected


def prefetch_router(service: Service, metrics: ServerMetrics) -> APIRouter:
    """The route of advice."""
    router = APIRouter(tags=["generate"], responses=ERROR_RESPONSES, route_class=BodyRoute)

    @router.post("/v1/prefetch", response_model=PrefetchResponse)
    async def prefetch(body: PrefetchRequest, request: Request) -> Response:
        """Say how much is cached of a prompt, a conversation or a session, and keep it for a request that will come."""
        service.check_model(body.model)
        found = await while_connected(request.receive, _found(service, body, request), service.deadline_s(request))
        metrics.observe_prefetch(found)
        answer: PrefetchResponse = {
            "object": "prefetch",
            "num_tokens": found.num_tokens,
            "num_cached_tokens": found.num_cached_tokens,
            "num_prefetched_tokens": found.num_prefetched_tokens,
        }
        return json_response(answer)

    return router


async def _found(service: Service, body: PrefetchRequest, request: Request) -> PrefetchCounts:
    """Ask the engine."""
    if body.prompt is None and body.messages is None:
        session_id = service.session_id(request, body.session_id)
        if session_id is None:
            raise ApiError(400, "give prompt, messages, or a session_id of earlier requests", param="prompt")
        with user_errors("session_id"):
            counts = await service.engine.prefetch_session(session_id)
        if counts is None:
            message = "no request with this session_id is remembered; give prompt or messages instead"
            raise ApiError(404, message, param="session_id", code="session_not_found")
        return counts
    token_ids = await _token_ids(service, body)
    with user_errors("prompt" if body.messages is None else "messages"):
        return await service.engine.prefetch(
            Prompt(text=None, token_ids=token_ids, cache_salt=service.cache_salt(request, body.cache_salt))
        )


async def _token_ids(service: Service, body: PrefetchRequest) -> list[int]:
    """The tokens that a completion or a chat completion would have."""
    if body.messages is not None:
        return await service.encode_chat(body.messages, body, add_special_tokens=body.add_special_tokens)
    prompt = body.only_prompt
    if isinstance(prompt, str):
        return await service.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
    return prompt or []
