"""Run the server: start the engine and the further front ends, answer, say so, and stop in good order.

`run_server` returns after SIGINT or SIGTERM and raises when the engine cannot start or dies; the command line turns the
error into one line and an exit status. This process is the first front end, the others are `siblings.py`'s. Routes are
in `app.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.child import ENGINE_MODULE, EngineChild
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.quiet_log import log_quietly
from nanoflow.server.answering import answer, run_loop, stop_at_signals
from nanoflow.server.cells import Cells
from nanoflow.server.hosts import is_loopback, with_hosts
from nanoflow.server.keys import with_all_keys
from nanoflow.server.listen import bind, choose_num_front_ends, num_cores, url
from nanoflow.server.siblings import Siblings, Surroundings
from nanoflow.server.tls import check_tls

logger = logging.getLogger(__name__)


def run_server(engine_config: EngineConfig, server_config: ServerConfig, *, engine_module: str = ENGINE_MODULE) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Prints one line once all processes answer. At a signal new connections are refused, running requests end with an
    error, and the engine is closed.

    Args:
        engine_config, server_config: What to serve, and how.
        engine_module: What the engine's process runs; tests have engines of their own.

    Raises:
        ConfigError: The address cannot be listened at, or keys or certificates cannot be used.
        EngineError: The engine or a front end cannot start.
        EngineDeadError: The engine died.
    """
    log_quietly("nanoflow")
    server_config = with_hosts(with_all_keys(server_config, os.environ))
    check_tls(server_config)
    if server_config.served_model_name is None:
        server_config = dataclasses.replace(server_config, served_model_name=engine_config.model)
    if server_config.api_servers is None:
        count = choose_num_front_ends(num_cores(), engine_config.goal)
        server_config = dataclasses.replace(server_config, api_servers=count)
    run_loop(_serve(engine_config, server_config, engine_module))


async def _serve(engine_config: EngineConfig, server_config: ServerConfig, engine_module: str) -> None:
    count = server_config.api_servers or 1
    with _listening(server_config, count) as (first, *others), _counting(count) as counts:
        if (
            warning := open_to_all(server_config, url(first, has_tls=server_config.ssl_certfile is not None))
        ) is not None:
            logger.warning(warning)
        stop = stop_at_signals()
        child = await EngineChild.start(engine_module)
        surroundings = Surroundings(
            engine_path=child.path,
            engine_config=engine_config,
            server_config=server_config,
            counts=counts or Path(),
        )
        siblings = await Siblings.start(surroundings, others)
        try:
            interval_s = server_config.stream_interval_ms / 1000
            load = AsyncEngine.load(child, engine_config, interval_s=interval_s)
            engine = await _unless_stopped(load, stop)
            if engine is not None:
                await _answer(engine, server_config, first, stop, siblings, Cells(counts))
        finally:
            await siblings.close()
            await child.close(0.0)


@contextlib.contextmanager
def _listening(config: ServerConfig, count: int) -> Iterator[list[socket.socket]]:
    """Sockets for so many processes, closed at the end."""
    listeners = bind(config.host, config.port, count)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


@contextlib.contextmanager
def _counting(count: int) -> Iterator[Path | None]:
    """A folder where several processes count, removed at the end; None for one process."""
    if count == 1:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nanoflow-counts-") as folder:
        yield Path(folder)


async def _unless_stopped(load: Coroutine[Any, Any, AsyncEngine], stop: asyncio.Event) -> AsyncEngine | None:
    """The loaded engine; None if a signal came while it loaded."""
    start, stopped = asyncio.create_task(load), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((start, stopped), return_when=asyncio.FIRST_COMPLETED)
        return start.result() if start.done() else None
    finally:
        start.cancel()
        stopped.cancel()
        await asyncio.gather(start, stopped, return_exceptions=True)


async def _answer(
    engine: AsyncEngine,
    config: ServerConfig,
    listener: socket.socket,
    stop: asyncio.Event,
    siblings: Siblings,
    cells: Cells,
) -> None:
    """Answer until a signal, or until the engine or the family cannot go on; then end them all."""
    is_ready = asyncio.Event()
    answering = asyncio.create_task(answer(engine, config, listener, stop, cells=cells, on_ready=is_ready.set))
    family = asyncio.create_task(_keep_family(engine, siblings, is_ready, _ready_line(engine, config, listener)))
    ends = (answering, family, asyncio.create_task(engine.dead()), asyncio.create_task(stop.wait()))
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    death = engine.death
    stop.set()
    for end in ends[1:]:
        end.cancel()
    _, problem, *_ = await asyncio.gather(*ends, siblings.close(), return_exceptions=True)
    if death is not None:
        raise EngineDeadError(f"the engine died: {death}")
    if isinstance(problem, Exception):
        raise problem
    answering.result()


async def _keep_family(engine: AsyncEngine, siblings: Siblings, is_ready: asyncio.Event, ready_line: str) -> None:
    """Say once that all front ends answer, then start again whichever ends."""
    await is_ready.wait()
    await siblings.ready()
    if engine.facts.limits is not None:
        print(f"nanoflow {engine.facts.limits.reason}", flush=True)
    if engine.facts.sampling.fields:
        print(f"nanoflow {engine.facts.sampling}", flush=True)
    print(ready_line, flush=True)
    await siblings.watch(engine)


def _ready_line(engine: AsyncEngine, config: ServerConfig, listener: socket.socket) -> str:
    root_url = url(listener, has_tls=config.ssl_certfile is not None)
    others = f", {config.api_servers} front ends" if config.api_servers != 1 else ""
    return (
        f"nanoflow serves {config.model_names[0]} (weights and cache in {engine.facts.load_s:.1f} s, "
        f"kernels in {engine.facts.warm_up_s:.1f} s{others}) at {root_url}/v1"
    )


def open_to_all(config: ServerConfig, root_url: str) -> str | None:
    """What to say if anybody on the network may use the server; None if that is not so."""
    if config.api_key or is_loopback(config.host):
        return None
    return f"whoever reaches {root_url} can use the model: give --api-key-file, or --host 127.0.0.1"
