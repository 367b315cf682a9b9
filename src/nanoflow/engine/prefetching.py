"""Advice that a front end gives to its engine: which request will come soon. Each waits for its answer.

The engine's side is `Engine.prefetch`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.messages import EngineFacts, Prefetch, PrefetchCounts, Prefetched
from nanoflow.engine.prompts import Prompt, make_requests
from nanoflow.request import SamplingParams


class Prefetching:
    """The advice of one front end that has no answer yet.

    Args:
        send: Sends a message to the engine.
        facts: Facts of the engine.
    """

    def __init__(self, send: Callable[[Prefetch], None], facts: EngineFacts) -> None:
        self._send = send
        self._facts = facts
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[PrefetchCounts | None]] = {}

    async def of_prompt(self, prompt: Prompt) -> PrefetchCounts:
        """Ask for the prefix of a prompt.

        Raises:
            RequestError: No request could have this prompt.
            EngineDeadError: The engine dies before it answers.
        """
        (request,) = make_requests(
            prompt,
            SamplingParams(max_tokens=1),
            facts=self._facts,
            first_id=0,
            first_seed=0,
            eos_token_ids=(),
            arrival_s=0.0,
        )
        found = await self._ask(page_keys=request.page_keys, num_tokens=len(prompt.token_ids))
        assert found is not None
        return found

    async def of_session(self, session_id: str) -> PrefetchCounts | None:
        """Ask for what the last request of a session has left; None if the session is not remembered."""
        return await self._ask(session=session_id)

    def take(self, answer: Prefetched) -> None:
        """Wake whoever waits for this answer, if somebody still does."""
        waiting = self._waiting.get(answer.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer.found)

    def die(self, reason: str) -> None:
        """There will be no more answers."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(EngineDeadError(reason))

    async def _ask(
        self, *, page_keys: bytes = b"", num_tokens: int = 0, session: str | None = None
    ) -> PrefetchCounts | None:
        number = next(self._numbers)
        waiting: asyncio.Future[PrefetchCounts | None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self._send(Prefetch(number=number, page_keys=page_keys, num_tokens=num_tokens, session=session))
            return await waiting
        finally:
            del self._waiting[number]
