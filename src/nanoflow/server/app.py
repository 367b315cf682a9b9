"""The FastAPI application: routes of one served model, put together.

`create_app` takes any engine that fits `backend.ServingEngine`, so that tests run it without a model or a port.
"""

from __future__ import annotations

from fastapi import FastAPI

import nanoflow
from nanoflow.config import ServerConfig
from nanoflow.server.backend import ServingEngine
from nanoflow.server.bodies import add_body_reader
from nanoflow.server.cells import Cells
from nanoflow.server.chat import chat_router
from nanoflow.server.completions import completions_router
from nanoflow.server.errors import install_error_handlers
from nanoflow.server.gate import Gate, GateMiddleware
from nanoflow.server.metrics import ServerMetrics
from nanoflow.server.service import Service
from nanoflow.server.status import models_router, status_router, tokens_router
from nanoflow.server.turnstile import TurnstileMiddleware


def create_app(
    engine: ServingEngine, server_config: ServerConfig, cells: Cells | None = None, gate: Gate | None = None
) -> FastAPI:
    """Build the application and let its metrics observe the engine.

    Args:
        engine: A running engine; the caller closes it.
        server_config: Only names, the metrics prefix and the heartbeat limit matter here.
        cells: Where metrics are counted, with other front ends; for this process alone if not given.
        gate: Who is let in; everybody if not given.
    """
    service = Service(engine=engine, config=server_config)
    metrics = ServerMetrics(engine, prefix=server_config.metrics_prefix, model_name=service.model_name, cells=cells)
    engine.observer = metrics
    app = FastAPI(
        title="nanoflow",
        summary="An OpenAI-compatible server",
        version=nanoflow.__version__,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.metrics = metrics
    install_error_handlers(app)
    add_body_reader(app)
    app.add_middleware(TurnstileMiddleware)
    app.add_middleware(GateMiddleware, gate=gate or Gate())
    for router in (completions_router(service), chat_router(service), models_router(service), tokens_router(service)):
        app.include_router(router)
    app.include_router(status_router(service, metrics))
    return app
