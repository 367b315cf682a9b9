"""Routes that do not generate: models, tokens, health, version and metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response

import nanoflow
from nanoflow.server.answers import beside, encoded
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.errors import ERROR_RESPONSES, ApiError, json_response
from nanoflow.server.metrics import ServerMetrics
from nanoflow.server.protocol import DetokenizeRequest, TokenizeRequest
from nanoflow.server.responses import (
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    TokenizerInfo,
    VersionResponse,
)
from nanoflow.server.service import Service


def status_router(service: Service, metrics: ServerMetrics) -> APIRouter:
    """Routes about the server's state."""
    router = APIRouter(tags=["status"], responses=ERROR_RESPONSES)
    rendering: asyncio.Future[bytes] | None = None

    @router.get("/health")
    async def health() -> HealthResponse:
        """Succeed while the engine is alive."""
        engine, age_s = service.engine, service.engine.heartbeat_age_s
        if not engine.is_alive:
            raise ApiError(503, "the engine does not run", code="engine_dead")
        if age_s > service.config.heartbeat_timeout_s:
            raise ApiError(503, f"the engine has been silent for {age_s:.0f} s", code="engine_silent")
        stats = engine.stats
        return {
            "status": "ok",
            "heartbeat_age_s": age_s,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
        }

    @router.get("/version")
    async def version() -> VersionResponse:
        """Version of nanoflow."""
        return {"version": nanoflow.__version__}

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_text() -> Response:
        """Metrics for Prometheus."""
        nonlocal rendering
        # Requests that arrive while metrics are rendered share the result.
        if rendering is None or rendering.done():
            rendering = asyncio.ensure_future(asyncio.to_thread(metrics.render))
        return Response(await asyncio.shield(rendering), media_type=metrics.content_type)

    return router


def models_router(service: Service) -> APIRouter:
    """Routes about the served model."""
    router = APIRouter(tags=["models"], responses=ERROR_RESPONSES)

    def card(name: str) -> ModelCard:
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "nanoflow",
            "root": service.model_name,
            "parent": None,
            "max_model_len": service.engine.facts.max_model_len,
        }

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The served model, under each of its names."""
        return {"object": "list", "data": [card(name) for name in service.config.model_names]}

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> ModelCard:
        """One model."""
        service.check_model(model_id)
        return card(model_id)

    return router


def tokens_router(service: Service) -> APIRouter:
    """Routes that convert between text and tokens."""
    router = APIRouter(tags=["tokens"], responses=ERROR_RESPONSES, route_class=BodyRoute)

    # Answers may be long, so they are encoded without FastAPI's validation of response models.
    @router.post("/tokenize", response_model=TokenizeResponse)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt or of a conversation."""
        service.check_model(body.model)
        if body.messages is not None:
            tokens = await service.encode_chat(body.messages, body, add_special_tokens=body.add_special_tokens)
        else:
            tokens = await service.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        answer: TokenizeResponse = {
            "count": len(tokens),
            "max_model_len": service.engine.facts.max_model_len,
            "tokens": tokens,
            "token_strs": await beside(service.tokenizer.token_names, tokens) if body.return_token_strs else None,
        }
        return await encoded(answer)

    @router.post("/detokenize", response_model=DetokenizeResponse)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids."""
        service.check_model(body.model)
        answer: DetokenizeResponse = {
            "prompt": await service.decode(body.tokens, skip_special_tokens=body.skip_special_tokens is True)
        }
        return json_response(answer)

    if service.config.enable_tokenizer_info_endpoint:

        @router.get("/tokenizer_info", response_model=TokenizerInfo)
        async def tokenizer_info() -> Response:
            """Configuration of the tokenizer."""
            return json_response(service.tokenizer.description())

    return router
