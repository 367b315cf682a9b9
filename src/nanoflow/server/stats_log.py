"""Log a line of statistics of all front ends every few seconds, if there was work."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import NoReturn

from nanoflow.engine.messages import EngineStats
from nanoflow.server.backend import ServingEngine
from nanoflow.server.metrics import ServerMetrics

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Tokens of all front ends since the start."""

    prompt: float
    generated: float


async def log_stats(engine: ServingEngine, metrics: ServerMetrics, interval_s: float = INTERVAL_S) -> NoReturn:
    """Log a line after each interval in which there was work."""
    before, before_s = _counts(metrics), time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        counts, now_s = _counts(metrics), time.monotonic()
        stats = engine.stats
        if counts != before or stats.num_running or stats.num_waiting:
            logger.info("%s", stats_line(stats, before, counts, now_s - before_s))
        before, before_s = counts, now_s


def stats_line(stats: EngineStats, before: TokenCounts, counts: TokenCounts, span_s: float) -> str:
    """The line about a span of time.

    Args:
        stats: The engine's state at the end.
        before, counts: Tokens at the beginning and at the end.
        span_s: Length of the span in seconds.
    """
    usage = stats.pages_in_use / stats.num_pages if stats.num_pages else 0.0
    return (
        f"running {stats.num_running}, waiting {stats.num_waiting}; "
        f"prompt {(counts.prompt - before.prompt) / span_s:.1f} tokens/s, "
        f"generation {(counts.generated - before.generated) / span_s:.1f} tokens/s; KV cache {usage:.1%} in use"
    )


def _counts(metrics: ServerMetrics) -> TokenCounts:
    prompt, generated = metrics.token_counts()
    return TokenCounts(prompt=prompt, generated=generated)
