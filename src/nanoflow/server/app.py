"""The FastAPI application with all routes for one served model.

`create_app` takes any `backend.ServingEngine`, so tests need neither a model nor a port.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

import nanoflow
from nanoflow.config import ServerConfig
from nanoflow.server.admission import Ledger
from nanoflow.server.backend import ServingEngine
from nanoflow.server.batch_store import BatchStore
from nanoflow.server.batches import batches_off_router, batches_router
from nanoflow.server.bodies import add_body_reader
from nanoflow.server.body_bounds import BodyBoundsMiddleware
from nanoflow.server.chat import chat_router
from nanoflow.server.completions import completions_router
from nanoflow.server.counters import Counters
from nanoflow.server.docs_page import docs_router
from nanoflow.server.door import door
from nanoflow.server.embeddings import embeddings_router
from nanoflow.server.errors import install_error_handlers
from nanoflow.server.files import FORM_BYTES, PATH, files_router
from nanoflow.server.gate import Gate, GateMiddleware
from nanoflow.server.message_routes import messages_router
from nanoflow.server.metrics import ServerMetrics
from nanoflow.server.page import page_router
from nanoflow.server.prefetch import prefetch_router
from nanoflow.server.response_routes import responses_router
from nanoflow.server.response_store import ResponseStore
from nanoflow.server.routes import include
from nanoflow.server.service import Service
from nanoflow.server.state import state_router
from nanoflow.server.status import models_router, status_router, tokens_router
from nanoflow.server.tracing import Tracing
from nanoflow.server.turnstile import TurnstileMiddleware


def create_app(
    engine: ServingEngine, server_config: ServerConfig, counters: Counters | None = None, gate: Gate | None = None
) -> Application:
    """Build the application and let its metrics observe the engine.

    Args:
        engine: A running engine; the caller closes it.
        server_config: Names, who may use it, bounds, the metrics prefix and the heartbeat limit matter here.
        counters: Counters of this process, with access to those of other front ends; None for a single process.
        gate: Who is let in; everybody if not given.
    """
    store = None if server_config.batch_dir is None else BatchStore.open(server_config.batch_dir)
    kept = ResponseStore.open(server_config)
    service = Service(engine=engine, config=server_config, ledger=Ledger(counters), tracing=Tracing.of(server_config))
    metrics = ServerMetrics(
        engine, prefix=server_config.metrics_prefix, model_name=service.model_name, counters=counters
    )
    engine.observer = metrics
    app = Application(
        title="nanoflow",
        summary="An OpenAI-compatible server",
        version=nanoflow.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server_config, app.state.metrics, app.state.batch_store = server_config, metrics, store
    app.state.tracing = service.tracing
    install_error_handlers(app)
    add_body_reader(app, service.call_bounds)
    uploads = {} if store is None else {PATH: server_config.max_file_bytes + FORM_BYTES}
    app.add_middleware(BodyBoundsMiddleware, bounds=server_config, uploads=uploads)
    app.add_middleware(TurnstileMiddleware)
    app.add_middleware(GateMiddleware, gate=gate or Gate())
    routers = (completions_router, chat_router, embeddings_router, models_router, tokens_router)
    observing = (prefetch_router, status_router, state_router)
    include(
        app,
        [
            *(router(service) for router in routers),
            responses_router(service, kept),
            messages_router(service),
            *(router(service, metrics) for router in observing),
            *(
                [batches_off_router()]
                if store is None
                else [batches_router(service, store), files_router(service, store)]
            ),
            docs_router(app, service),
            page_router(service),
        ],
    )
    return app


class Application(FastAPI):
    """FastAPI with the checks of `door.py` before everything, including its own pages and error answers."""

    _inside: ASGIApp

    @property
    def inside(self) -> ASGIApp:
        """The application behind the checks, for calls of the server itself (`inside.py`)."""
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        return self._inside

    def build_middleware_stack(self) -> ASGIApp:
        """The whole application; it is built once."""
        self._inside = super().build_middleware_stack()
        return door(self._inside, self.state.server_config)
