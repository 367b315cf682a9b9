"""POST /v1/embeddings: vectors of texts, from the hidden states of the model (`engine/embeddings.py`)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial

import numpy as np
from fastapi import APIRouter, Request, Response

from nanoflow.engine.embeddings import embedding_params, finished_vector, read_dimensions
from nanoflow.outputs import RequestOutput
from nanoflow.server.answers import answer_of, beside
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.embedding_fields import EmbeddingRequest
from nanoflow.server.errors import ERROR_RESPONSES, user_errors
from nanoflow.server.generation import Call, count_usage, new_id
from nanoflow.server.responses import EmbeddingResponse
from nanoflow.server.service import Service
from nanoflow.server.streaming import while_connected


def embeddings_router(service: Service) -> APIRouter:
    """The route of embeddings."""
    router = APIRouter(tags=["generate"], responses=ERROR_RESPONSES, route_class=BodyRoute)

    @router.post("/v1/embeddings", response_model=EmbeddingResponse)
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """A vector for each input."""
        service.check_model(body.model)
        with user_errors():
            read_dimensions(body.dimensions, service.engine.facts.hidden_size)
        params, call_id = embedding_params(body.pooling or "last"), new_id("embd")
        trace = service.trace("embeddings", request, params, call_id)
        prompts, deadline_s = body.inputs, service.deadline_s(request)
        service.admission.check(len(prompts))
        if body.changes_tokens:
            reading = service.prompt_token_ids(prompts, body, params.max_tokens)
            prompts = await while_connected(request.receive, reading, deadline_s)
        call = Call(
            engine=service.engine,
            prompts=prompts,
            params=params,
            doors=service,
            cache_salt=service.cache_salt(request, body.cache_salt),
            priority=body.priority_in(request.scope),
            call_id=call_id,
            trace=trace,
            field_names={"prompt": "input"},
        )
        return await while_connected(request.receive, answer_of(_answer(service, body, call)), deadline_s)

    return router


async def _answer(service: Service, body: EmbeddingRequest, call: Call) -> EmbeddingResponse:
    outputs = await call.outputs()
    vectors = await beside(partial(_vectors, body, outputs))
    usage = count_usage(outputs, is_completion_hidden=True)
    return {
        "id": call.call_id,
        "object": "list",
        "created": call.created,
        "model": service.model_name,
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)],
        "usage": usage,
    }


def _vectors(body: EmbeddingRequest, outputs: Sequence[RequestOutput]) -> list[list[float] | str]:
    """The vectors as the answer has them."""
    finish = partial(finished_vector, dimensions=body.dimensions, normalize=body.normalize is not False)
    vectors = [finish(output.embedding or []) for output in outputs]
    if body.encoding_format != "base64":
        return list(vectors)
    return [base64.b64encode(np.array(vector, "<f4").tobytes()).decode() for vector in vectors]
