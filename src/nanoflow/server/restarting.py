"""Start the engine again when it has died, as often as allowed.

Front ends end the requests of the dead engine with an error. While the next one starts, the gate refuses new requests;
metrics continue. `engine/child.py` starts processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.errors import EngineDeadError, EngineError
from nanoflow.server.gate import DRAINING, Gate, restarting
from nanoflow.server.lasting import LastingEngine
from nanoflow.server.siblings import Siblings

logger = logging.getLogger(__name__)


async def keep_engine(
    engine: LastingEngine,
    start: Callable[[], Awaitable[AsyncEngine]],
    *,
    gate: Gate,
    siblings: Siblings,
    max_restarts: int,
) -> NoReturn:
    """Start the engine again whenever it has died, up to the allowed number of times, but not while the server drains.

    Raises:
        EngineDeadError: It has died more often; the message is the last reason.
    """
    death = await _death(engine)
    for number in range(1, max_restarts + 1):
        if gate.closed is DRAINING:
            break
        gate.close(restarting(engine.facts.load_s + engine.facts.warm_up_s))
        siblings.lose_engine()
        logger.warning("the engine died: %s; it is started again (%d of %d)", death, number, max_restarts)
        begin_s = time.monotonic()
        await engine.close()
        try:
            engine.replace(await start())
        except EngineError as error:
            death = str(error)
            continue
        siblings.join_engine()
        gate.open()
        logger.warning("the engine runs again after %.1f s", time.monotonic() - begin_s)
        death = await _death(engine)
    raise EngineDeadError(f"the engine died: {death}")


async def _death(engine: LastingEngine) -> str:
    """Wait until the engine has died; return why."""
    await engine.current.dead()
    return engine.current.death or "nobody knows why"
