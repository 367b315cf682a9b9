"""Run the server: start the engine, listen, say so, and stop in good order.

`run_server` returns after SIGINT or SIGTERM and raises when the engine cannot start or dies; the command line turns the
error into one line and an exit status. Routes are in `app.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
from collections.abc import Iterator

import uvicorn

from nanoflow.config import ConfigError, EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.errors import EngineDeadError
from nanoflow.server.app import create_app

LIVENESS_CHECK_S = 0.5
STREAM_END_TIMEOUT_S = 5  # for clients that do not read the end of their stream


def run_server(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Prints one line once it answers. At a signal new connections are refused, running requests end with an error, and
    the engine is closed.

    Raises:
        ConfigError: The address cannot be listened at.
        EngineError: The engine cannot start.
        EngineDeadError: The engine died.
    """
    if server_config.served_model_name is None:
        server_config = dataclasses.replace(server_config, served_model_name=engine_config.model)
    asyncio.run(_serve(engine_config, server_config))


async def _serve(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    with bind(server_config.host, server_config.port) as listener:
        stop = _stop_at_signals()
        engine = await _start_unless_stopped(engine_config, stop)
        if engine is None:
            return
        try:
            await _answer(engine, server_config, listener, stop)
        finally:
            await engine.close()


async def _start_unless_stopped(config: EngineConfig, stop: asyncio.Event) -> AsyncEngine | None:
    """Start the engine; None if a signal came while it loaded."""
    start, stopped = asyncio.create_task(AsyncEngine.start(config)), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((start, stopped), return_when=asyncio.FIRST_COMPLETED)
        return start.result() if start.done() else None
    finally:
        start.cancel()
        stopped.cancel()
        await asyncio.gather(start, stopped, return_exceptions=True)


async def _answer(engine: AsyncEngine, config: ServerConfig, listener: socket.socket, stop: asyncio.Event) -> None:
    app = create_app(engine, config)
    is_verbose = config.log_level == "debug"
    server = _Server(
        uvicorn.Config(
            app,
            log_level="warning" if config.log_level == "info" else config.log_level,
            access_log=is_verbose,
            timeout_graceful_shutdown=STREAM_END_TIMEOUT_S,
        ),
        ready_line=(
            f"nanoflow serves {config.served_model_name} (weights and cache in {engine.facts.load_s:.1f} s, "
            f"kernels in {engine.facts.warm_up_s:.1f} s) at {url(listener)}/v1"
        ),
    )
    if engine.facts.limits is not None:
        print(f"nanoflow {engine.facts.limits.reason}", flush=True)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while engine.is_alive and not stop.is_set() and not serving.done():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), LIVENESS_CHECK_S)
    death = engine.death
    server.should_exit = True
    await engine.close()  # running requests end now, so that the server has nothing left to wait for
    await serving
    if death is not None:
        raise EngineDeadError(f"the engine died: {death}")


class _Server(uvicorn.Server):
    """uvicorn, which says when it answers and leaves signals to us."""

    def __init__(self, config: uvicorn.Config, ready_line: str) -> None:
        super().__init__(config)
        self._ready_line = ready_line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready_line, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _stop_at_signals() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which refuses connections until it is listened at; port 0 takes a free one.

    Raises:
        ConfigError: The address is not there, or taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return listener


def url(listener: socket.socket) -> str:
    """Address of a bound socket for people and programs."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
