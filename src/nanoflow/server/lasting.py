"""`LastingEngine`: the engine as routes and metrics see it; it stays the same object when the engine is replaced.

Requests belong to the engine that they were given to, and end with it. State and counts outlast it. `serve.py` and
`front_end.py` replace the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.messages import EngineFacts, EngineStats, PrefetchCounts
from nanoflow.engine.observer import Observer
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.outputs import RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.server.backend import EnginePrompt

# Counted by an engine since its start.
_COUNTS = (
    *("num_preemptions", "prefix_cache_queries", "prefix_cache_hits"),
    *("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_undrafted_requests"),
    *("iteration", "iterations_s"),
)


class LastingEngine:
    """The engine that runs now, or the one that ran last while the next is being started.

    Args:
        engine: The first engine.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.current = engine
        self._before: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
        self._tiers_before: dict[str, TierCounts] = {}

    def replace(self, engine: AsyncEngine) -> None:
        """Use another engine from now on; the observer is told of its requests."""
        engine.observer = self.current.observer
        stats = self.stats
        self._before = {name: getattr(stats, name) for name in _COUNTS}
        self._tiers_before = {name: tier.counters for name, tier in stats.tiers.items()}
        self.current = engine

    @property
    def observer(self) -> Observer | None:
        """What is told of times and counts."""
        return self.current.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self.current.observer = observer

    @property
    def facts(self) -> EngineFacts:
        """What is loaded."""
        return self.current.facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; RequestError if it has none."""
        return self.current.tokenizer

    @property
    def stats(self) -> EngineStats:
        """State of the engine; an ended engine has no requests. Counts are sums over all engines so far."""
        stats = self.current.stats
        counts = {name: getattr(stats, name) + before for name, before in self._before.items()}
        if not self.is_alive:
            return EngineStats(num_pages=stats.num_pages, tiers=self._tiers_before_and(stats, is_used=False), **counts)
        if not any(self._before.values()) and not self._tiers_before:
            return stats
        return dataclasses.replace(stats, tiers=self._tiers_before_and(stats, is_used=True), **counts)

    def _tiers_before_and(self, stats: EngineStats, *, is_used: bool) -> dict[str, TierCounts]:
        """The tiers of this engine, with the counts of those before it."""
        now = {name: tier if is_used else tier.counters for name, tier in stats.tiers.items()}
        names = {**self._tiers_before, **now}
        return {name: self._tiers_before.get(name, TierCounts()) + now.get(name, TierCounts()) for name in names}

    @property
    def is_alive(self) -> bool:
        """False once the engine has ended, until the next one runs."""
        return self.current.is_alive

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the last message of the engine."""
        return self.current.heartbeat_age_s

    def generate(
        self, prompt: EnginePrompt, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt with the engine that runs now; see `AsyncEngine.generate`."""
        return self.current.generate(prompt, params, request_id, streams=streams)

    async def prefetch(self, prompt: EnginePrompt) -> PrefetchCounts:
        """See `AsyncEngine.prefetch`."""
        return await self.current.prefetch(prompt)

    async def prefetch_session(self, session_id: str) -> PrefetchCounts | None:
        """See `AsyncEngine.prefetch_session`; an engine that was started again remembers no session of the last one."""
        return await self.current.prefetch_session(session_id)

    async def close(self) -> None:
        """Close the engine."""
        await self.current.close()
