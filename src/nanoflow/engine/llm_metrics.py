"""Counters and gauges of `LLM.get_metrics`, with the names that the server's metrics have.

The server's metrics, which have histograms too, are in `server/metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nanoflow.engine.messages import EngineStats
from nanoflow.outputs import RequestOutput

PREFIX = "nanoflow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number with a name and labels."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter(Metric):
    """A metric that only grows."""

    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge(Metric):
    """A metric that goes up and down."""


class LLMMetrics:
    """Counts the tokens and requests of an engine.

    Args:
        model_name: Label of each metric.
    """

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._stats = EngineStats()
        self._num_prompt = self._num_generated = self._num_ended = 0

    def take(self, stats: EngineStats, num_generated_tokens: int) -> None:
        """Note the state after an iteration, and the tokens that outputs have got since the start."""
        self._stats = stats
        self._num_generated = num_generated_tokens

    def end(self, outputs: Iterable[RequestOutput]) -> None:
        """Count requests that have ended."""
        for output in outputs:
            self._num_ended += 1
            self._num_prompt += len(output.prompt_token_ids)

    def read(self) -> list[Metric]:
        """All metrics with their present values."""
        stats = self._stats
        gauges = {
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_perc": stats.pages_in_use / stats.num_pages if stats.num_pages else 0.0,
        }
        counters = {
            "num_preemptions": stats.num_preemptions,
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
            "spec_decode_num_drafts": stats.num_drafts,
            "spec_decode_num_draft_tokens": stats.num_draft_tokens,
            "spec_decode_num_accepted_tokens": stats.num_accepted_tokens,
            "spec_decode_num_undrafted_requests": stats.num_undrafted_requests,
            "prompt_tokens": self._num_prompt,
            "generation_tokens": self._num_generated,
            "request_success": self._num_ended,
        }
        classes = {name: {**self._labels, "priority": name} for name in stats.classes}
        by_class = [
            *(
                Gauge(name=f"{PREFIX}:num_requests_{state}_by_priority", value=value, labels=classes[name])
                for name, counts in stats.classes.items()
                for state, value in (("running", counts.num_running), ("waiting", counts.num_waiting))
            ),
            *(
                Counter(name=f"{PREFIX}:{kind}_by_priority", value=value, labels=classes[name])
                for name, counts in stats.classes.items()
                for kind, value in (("tokens", counts.num_tokens), ("num_preemptions", counts.num_preemptions))
            ),
        ]
        return [
            *(Gauge(name=f"{PREFIX}:{name}", value=value, labels=self._labels) for name, value in gauges.items()),
            *(Counter(name=f"{PREFIX}:{name}", value=value, labels=self._labels) for name, value in counters.items()),
            *by_class,
        ]
