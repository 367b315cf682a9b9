"""A server that runs: bind its addresses, start the further front ends, answer requests, and stop in an orderly way.

`serve.py` starts the engine's process and then imports this file, which takes about a second. This process is the first
front end; `siblings.py` runs the others. `app.py` has the routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.child import EngineChild
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.place import EnginePlace
from nanoflow.engine.template_probe import template_problem
from nanoflow.request import RequestError
from nanoflow.server.answering import answer
from nanoflow.server.counters import Counters, shared_rows
from nanoflow.server.gate import DRAINING, Gate
from nanoflow.server.hosts import is_loopback, with_hosts
from nanoflow.server.keys import with_all_keys
from nanoflow.server.lasting import LastingEngine
from nanoflow.server.listen import bind, choose_num_front_ends, num_cores, url
from nanoflow.server.response_store import with_response_folder
from nanoflow.server.restarting import keep_engine
from nanoflow.server.siblings import Siblings, Surroundings
from nanoflow.server.signals import StopSignals
from nanoflow.server.tls import check_tls
from nanoflow.server.tracing import check_tracing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """What all parts of a running server share.

    Attributes:
        engine_config, config: Options of the engine and of the server.
        engine_module: What the engine's process runs.
        place: The socket where front ends connect to the engine.
        listener: Bound socket of this process.
        signals: The signals that end the server.
        siblings: The further front ends.
        gate: Who is let in here.
        counters: Counters of this process.
    """

    engine_config: EngineConfig
    config: ServerConfig
    engine_module: str
    place: EnginePlace
    listener: socket.socket
    signals: StopSignals
    siblings: Siblings
    gate: Gate
    counters: Counters

    async def load(self, child: EngineChild) -> AsyncEngine:
        """Load the engine in a process that runs already."""
        return await AsyncEngine.load(child, self.engine_config, interval_s=self.config.stream_interval_ms / 1000)

    async def start_engine(self) -> AsyncEngine:
        """Start another engine after one has died."""
        return await self.load(await EngineChild.start(self.engine_module, self.place))


async def run(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    engine_module: str,
    place: EnginePlace,
    child: EngineChild,
    signals: StopSignals,
) -> None:
    """Serve until a signal ends it; see `serve.run_server`.

    Args:
        engine_config, server_config: Options of the engine and of the server.
        engine_module: What the engine's process runs.
        place: The socket where front ends connect to the engine.
        child: The engine's process, which waits for its first message. The caller ends it.
        signals: The signals that end the server.
    """
    server_config = _completed(engine_config, server_config)
    count = server_config.api_servers or 1
    with (
        with_response_folder(server_config) as server_config,
        _listening(server_config, count) as (first, *others),
        shared_rows(count) as counts,
    ):
        root_url = url(first, has_tls=server_config.ssl_certfile is not None)
        if (warning := open_to_all(server_config, root_url)) is not None:
            logger.warning(warning)
        surroundings = Surroundings(
            engine=place, engine_config=engine_config, server_config=server_config, counts=counts
        )
        siblings = await Siblings.start(surroundings, others)
        server = _Server(
            engine_config=engine_config,
            config=server_config,
            engine_module=engine_module,
            place=place,
            listener=first,
            signals=signals,
            siblings=siblings,
            gate=Gate(),
            counters=Counters(counts),
        )
        try:
            engine = await _unless_stopped(server.load(child), signals.first)
            if engine is not None:
                probing = asyncio.create_task(_warn_of_template(engine))  # templates run in another process
                try:
                    await _answer(server, LastingEngine(engine))
                finally:
                    probing.cancel()
                    await asyncio.gather(probing, return_exceptions=True)
        finally:
            await siblings.close()


def _completed(engine_config: EngineConfig, config: ServerConfig) -> ServerConfig:
    """The server's options, checked, with those that were not given; ConfigError if one cannot be used."""
    config = with_hosts(with_all_keys(config, os.environ))
    check_tls(config)
    check_tracing(config)
    if config.served_model_name is None:
        config = dataclasses.replace(config, served_model_name=engine_config.model)
    if config.api_servers is None:
        config = dataclasses.replace(config, api_servers=choose_num_front_ends(num_cores(), engine_config.goal))
    return config


@contextlib.contextmanager
def _listening(config: ServerConfig, count: int) -> Iterator[list[socket.socket]]:
    """Listening sockets for the processes; they are closed at the end of the block."""
    listeners = bind(config.host, config.port, count)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


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


async def _warn_of_template(engine: AsyncEngine) -> None:
    """Warn in one line if the model's chat template is broken; completions of plain prompts still work."""
    with contextlib.suppress(RequestError, EngineDeadError):  # there is no tokenizer, or the engine was closed
        problem = await asyncio.to_thread(template_problem, engine.tokenizer)
        if problem is not None:
            logger.warning("chat completions will fail: %s", problem)


async def _answer(server: _Server, engine: LastingEngine) -> None:
    """Answer until a signal ends the server, or the engine or front ends cannot be restarted; then end all."""
    is_ready, stop = asyncio.Event(), asyncio.Event()
    answering = asyncio.create_task(
        answer(
            engine,
            server.config,
            server.listener,
            stop,
            gate=server.gate,
            counters=server.counters,
            is_main=True,
            on_ready=is_ready.set,
        )
    )
    keeping = keep_engine(
        engine,
        server.start_engine,
        gate=server.gate,
        siblings=server.siblings,
        max_restarts=server.config.restart_engine,
    )
    tasks = [asyncio.create_task(work) for work in (keeping, _keep_family(server, engine, is_ready), _drain(server))]
    try:
        await asyncio.wait((answering, *tasks), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, answering, server.siblings.close(), return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


async def _drain(server: _Server) -> None:
    """Wait for a signal, then refuse new calls and wait until running ones end, a timeout, or a second signal."""
    await server.signals.first.wait()
    server.gate.close(DRAINING)
    server.siblings.drain()
    timeout_s = server.config.shutdown_timeout
    if server.gate.num_inside and timeout_s:
        logger.warning(
            "stopping: requests have %g s to end and new ones are refused; a second signal ends them now", timeout_s
        )
    ends = (
        asyncio.gather(server.gate.empty(), server.siblings.drained()),
        asyncio.create_task(server.signals.second.wait()),
    )
    try:
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


async def _keep_family(server: _Server, engine: LastingEngine, is_ready: asyncio.Event) -> None:
    """Wait until all front ends answer and report it, then restart those that end."""
    await is_ready.wait()
    await server.siblings.ready()
    if engine.facts.limits is not None:
        print(f"nanoflow {engine.facts.limits.reason}", flush=True)
    if engine.facts.sampling.fields:
        print(f"nanoflow {engine.facts.sampling}", flush=True)
    print(_ready_line(engine, server.config, server.listener), flush=True)
    await server.siblings.watch(engine)


def _ready_line(engine: LastingEngine, config: ServerConfig, listener: socket.socket) -> str:
    root_url = url(listener, has_tls=config.ssl_certfile is not None)
    others = f", {config.api_servers} front ends" if config.api_servers != 1 else ""
    return (
        f"nanoflow serves {config.model_names[0]} (weights and cache in {engine.facts.load_s:.1f} s, "
        f"kernels in {engine.facts.warm_up_s:.1f} s{others}) at {root_url}/v1"
    )


def open_to_all(config: ServerConfig, root_url: str) -> str | None:
    """A warning if anybody on the network may use the server; None otherwise."""
    if config.api_key or is_loopback(config.host):
        return None
    return f"whoever reaches {root_url} can use the model: give --api-key-file, or --host 127.0.0.1"
