"""Wait until an engine is ready, or until it is clear that it will not be.

`child.py` starts the engine's process, `async_engine.py` joins it.
"""

from __future__ import annotations

import asyncio
import logging

from nanoflow.engine.child import EngineChild
from nanoflow.engine.errors import EngineDeadError, EngineError
from nanoflow.engine.link import EngineLink
from nanoflow.engine.messages import EngineFacts, Failed, FromEngine, Ready, Told
from nanoflow.engine.wire import WireError

logger = logging.getLogger(__name__)

# How long a message may still be on its way when the engine's process has ended.
DRAIN_S = 0.2


async def ready(link: EngineLink, child: EngineChild | None = None) -> EngineFacts:
    """Wait for the engine; EngineError if it cannot start."""
    first = asyncio.create_task(_first_answer(link))
    end = None if child is None else asyncio.create_task(child.end())
    try:
        await asyncio.wait((first,) if end is None else (first, end), return_when=asyncio.FIRST_COMPLETED)
        if end is not None and not first.done():
            await asyncio.wait((first,), timeout=DRAIN_S)
            if not first.done():
                raise EngineDeadError(end.result())
        message = first.result()
    finally:
        first.cancel()
        if end is not None:
            end.cancel()
    if isinstance(message, Ready):
        return message.facts
    reason = message.message if isinstance(message, Failed) else f"unexpected {type(message).__name__}"
    raise EngineError(reason)


async def _first_answer(link: EngineLink) -> FromEngine | WireError:
    """Log messages of the engine until another message arrives; return that one."""
    while isinstance(message := await link.receive(), Told):
        logger.log(message.level, "%s", message.text)
    return message
