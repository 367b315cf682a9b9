"""Answer HTTP in one process: run the application in uvicorn until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Iterator
from importlib.util import find_spec
from typing import Any

import uvicorn
from fastapi import FastAPI

from nanoflow.config import ServerConfig
from nanoflow.engine.garbage import freeze_heap
from nanoflow.server.app import Application, create_app
from nanoflow.server.batch_worker import BatchWorker
from nanoflow.server.connections import Connections
from nanoflow.server.counters import Counters
from nanoflow.server.gate import Gate
from nanoflow.server.lasting import LastingEngine
from nanoflow.server.listen import BACKLOG
from nanoflow.server.stats_log import log_stats
from nanoflow.server.tls import uvicorn_arguments
from nanoflow.server.wire import on_the_wire

Work = Coroutine[Any, Any, None]

_NEVER_S = 10**6
STREAM_END_TIMEOUT_S = 5  # for clients that do not read the end of their stream


async def answer(
    engine: LastingEngine,
    config: ServerConfig,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    gate: Gate,
    counters: Counters,
    is_main: bool,
    on_ready: Callable[[], None],
) -> None:
    """Serve an engine until `stop` is set, then end running requests and close the engine.

    Args:
        engine: Closed on return.
        config: Names, limits and log level.
        listener: A bound socket.
        stop: Tells to stop.
        gate: Who is let in.
        counters: Counters of this process.
        is_main: For one of all processes: log the statistics of all, and run batches.
        on_ready: Called once requests are answered.
    """
    freeze_heap()
    app, connections = create_app(engine, config, counters, gate), Connections(config)
    server = _Server(_uvicorn_config(app, config, connections), on_ready)
    beside = [asyncio.create_task(work) for work in _beside(app, engine, config, gate)] if is_main else []
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    watching = asyncio.create_task(connections.watch(), name="connection watch")
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        watching.cancel()
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        server.should_exit = True
        await engine.close()  # ends running requests, so that uvicorn does not wait for them
    await serving
    if app.state.tracing is not None:
        await asyncio.to_thread(app.state.tracing.close)


def _beside(app: Application, engine: LastingEngine, config: ServerConfig, gate: Gate) -> Iterator[Work]:
    """What the main process does beside answering."""
    if config.log_stats:
        yield log_stats(engine, app.state.metrics)
    if app.state.batch_store is not None:
        worker = BatchWorker(
            app=app,
            store=app.state.batch_store,
            gate=gate,
            num_at_once=config.batch_requests_at_once or engine.facts.max_num_seqs,
            max_lines=config.max_batch_lines,
        )
        yield worker.run()


def _uvicorn_config(app: FastAPI, config: ServerConfig, connections: Connections) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connections.protocol(http_protocol()),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        log_config=None,  # `log_quietly` has configured logging
        # Connections without a request are ended by `connections.py`.
        timeout_keep_alive=_NEVER_S,
        log_level="warning" if config.log_level == "info" else config.log_level,
        access_log=config.log_level == "debug",
        timeout_graceful_shutdown=STREAM_END_TIMEOUT_S,
        **uvicorn_arguments(config),
    )


def http_protocol() -> Any:
    """uvicorn's protocol class: the one with httptools if that is installed, else the one with h11."""
    if find_spec("httptools") is None:
        from uvicorn.protocols.http.h11_impl import H11Protocol

        return on_the_wire(H11Protocol)
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from nanoflow.server.upgrades import without_upgrades

    return on_the_wire(without_upgrades(HttpToolsProtocol))


class _Server(uvicorn.Server):
    """uvicorn's server, which calls `on_ready` when it answers and handles no signals."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
