"""Run the server. The engine's process is started first: until it has imported torch, this process imports the rest.

`run_server` returns after SIGINT or SIGTERM, and raises if the engine cannot start or dies; the command line makes one
line and an exit status of the error. What happens between is in `running.py`.
"""

from __future__ import annotations

import contextlib

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.child import ENGINE_MODULE, EngineChild
from nanoflow.engine.place import EnginePlace
from nanoflow.server.event_loop import run_loop
from nanoflow.server.logs import start_logging
from nanoflow.server.signals import StopSignals


def run_server(engine_config: EngineConfig, server_config: ServerConfig, *, engine_module: str = ENGINE_MODULE) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Prints one line once all processes answer. After the first signal new requests are refused, and running ones have
    `shutdown_timeout` seconds to end. After that time or a second signal they end with an error. Then the engine is
    closed.

    Args:
        engine_config, server_config: Options of the engine and of the server.
        engine_module: What the engine's process runs; tests have engines of their own.

    Raises:
        ConfigError: The address cannot be listened at, or keys or certificates cannot be used.
        EngineError: The engine or a front end cannot start.
        EngineDeadError: The engine died, more often than it may be started again.
    """
    start_logging(server_config.log_level)
    run_loop(_serve(engine_config, server_config, engine_module))


async def _serve(engine_config: EngineConfig, server_config: ServerConfig, engine_module: str) -> None:
    signals = StopSignals()
    with contextlib.closing(EnginePlace()) as place:
        child = await EngineChild.start(engine_module, place)
        try:
            from nanoflow.server.running import run

            await run(
                engine_config, server_config, engine_module=engine_module, place=place, child=child, signals=signals
            )
        finally:
            await child.close(0.0)
