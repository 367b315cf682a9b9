"""Metrics for Prometheus: observe the engine's front end, and render the counts.

Names (after the prefix), labels and buckets are those that dashboards for LLM servers expect. Knows no HTTP; the engine
calls the observer methods with plain numbers (`engine/observer.py`). What is counted stands in `counters.py`, where the
counts of all front ends add up. Gauges, and what the engine counts itself, are read from its state when asked for: they
are right in an idle engine too, and the same whichever front end answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nanoflow.engine.book_facts import BookFacts
from nanoflow.engine.limits import EngineLimits
from nanoflow.engine.messages import EngineStats, PrefetchCounts
from nanoflow.engine.observer import FinishedRequest
from nanoflow.outputs import FinishReason
from nanoflow.server.backend import ServingEngine
from nanoflow.server.class_metrics import class_families
from nanoflow.server.counters import Counter, Counters, Floats, Histogram
from nanoflow.server.tier_metrics import tier_families

FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ITERATION_BUCKETS = (1, 8, *(2**exponent for exponent in range(4, 15)))
CHOICES_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTIONS_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
LABELS = ("model_name", "engine")

Buckets = tuple[float, ...]
# Makes one metric family from the sums over all front ends.
Family = Callable[[Floats], Metric]


def token_count_buckets(max_model_len: int) -> Buckets:
    """1, 2, 5, 10, 20, 50, ... up to the context length."""
    steps = (digit * 10**zeros for zeros in range(len(str(max_model_len))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= max_model_len)


class ServerMetrics(Collector):
    """Metrics of one engine, with the sums over all front ends.

    Args:
        engine: The engine, whose state is read when metrics are requested.
        prefix: Prefix of each name, before a colon.
        model_name: Label of each series.
        counters: Counters of this front end, with access to those of others; None for a single process.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self, engine: ServingEngine, *, prefix: str, model_name: str, counters: Counters | None = None
    ) -> None:
        self._counters = counters or Counters()
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._families: list[Family] = []
        self._add_state(engine)
        self._add_counters()
        self._add_plans(engine.facts.book)
        self._add_latencies()
        self._add_sizes(token_count_buckets(engine.facts.max_model_len))
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe_step(self, stats: EngineStats) -> None:
        """An iteration has ended."""
        self._iteration_tokens.observe(stats.iteration_tokens + stats.prefill_ends - stats.rejected_tokens)
        if stats.plan_digest is not None:
            self._iterations[stats.plan_digest].inc()

    def observe_first_token(self, ttft_s: float, num_prompt_tokens: int) -> None:
        """A request got the first token of any of its completions."""
        self._first_token_s.observe(ttft_s)
        self._prompt_tokens.inc(num_prompt_tokens)

    def observe_tokens(self, num_tokens: int) -> None:
        """Completions got so many tokens, including first ones."""
        self._generation_tokens.inc(num_tokens)

    def observe_next_tokens(self, latencies_s: Sequence[float]) -> None:
        """Completions got a token that is not their first."""
        self._next_token_s.observe_many(latencies_s)

    def observe_prefetch(self, found: PrefetchCounts) -> None:
        """Advice about a request that will come was answered."""
        counts = (1, found.num_tokens, found.num_cached_tokens, found.num_prefetched_tokens)
        for counter, count in zip(self._prefetches, counts, strict=True):
            counter.inc(count)

    def observe_finished(self, request: FinishedRequest) -> None:
        """A request ended."""
        self._ended[request.reason].inc()
        seen: tuple[tuple[Histogram, float | None], ...] = (
            (self._e2e_s, request.e2e_s),
            (self._queue_s, request.queue_s),
            (self._prefill_s, request.prefill_s),
            (self._decode_s, request.decode_s),
            (self._inference_s, request.inference_s),
            (self._per_token_s, request.tpot_s),
            (self._request_prompt_tokens, request.num_prompt_tokens),
            (self._request_tokens, request.num_generated_tokens),
            (self._longest_completion, request.longest_completion_tokens),
            (self._params_max_tokens, request.max_tokens),
            (self._params_n, request.n),
            (self._request_preemptions, request.num_preemptions),
        )
        for histogram, value in seen:
            if value is not None:
                histogram.observe(value)

    def token_counts(self) -> tuple[float, float]:
        """Prompt tokens, and tokens generated, of all front ends since the start."""
        total = self._counters.total()
        return float(total[self._prompt_tokens.place][0]), float(total[self._generation_tokens.place][0])

    def plan_iterations(self) -> dict[str, int]:
        """Iterations that each plan ran, of all front ends since the start, by the plan's digest."""
        total = self._counters.total()
        return {digest: int(total[counter.place][0]) for digest, counter in self._iterations.items()}

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All families of series, as the registry asks for them."""
        total = self._counters.total()
        for family in self._families:
            yield family(total)

    def _add_state(self, engine: ServingEngine) -> None:
        add = self._gauge
        add("num_requests_running", "Requests that hold KV pages", lambda: engine.stats.num_running)
        add("num_requests_waiting", "Requests that wait for admission", lambda: engine.stats.num_waiting)
        add(
            "kv_cache_usage_perc",
            "Part of the KV pages in use, 0 to 1",
            lambda: engine.stats.pages_in_use / max(engine.stats.num_pages, 1),
        )
        facts = engine.facts
        self._info(
            "cache_config_info",
            "The KV cache, in labels",
            [
                {
                    "block_size": facts.page_size,
                    "num_gpu_blocks": facts.num_pages,
                    "kv_cache_size_tokens": facts.page_size * facts.num_pages,
                    "cache_dtype": facts.dtype if facts.kv_cache_dtype == "auto" else facts.kv_cache_dtype,
                    **{
                        f"num_gpu_blocks_window_{pool.window}": pool.num_pages
                        for pool in facts.group_pools
                        if pool.window is not None
                    },
                }
            ],
        )
        if facts.limits is not None:
            text = "The limits that were given or chosen at the start, in labels"
            self._info("limits_info", text, [_limits_labels(facts.limits)])
        self._count(
            "num_preemptions", "Times KV pages were taken back from a request", lambda: engine.stats.num_preemptions
        )
        self._count(
            "prefix_cache_queries",
            "Tokens of requests that looked for cached pages",
            lambda: engine.stats.prefix_cache_queries,
        )
        self._count("engine_iterations", "Iterations", lambda: engine.stats.iteration)
        self._count("engine_iteration_seconds", "Seconds that they took together", lambda: engine.stats.iterations_s)
        self._count("prefix_cache_hits", "Those whose pages were found", lambda: engine.stats.prefix_cache_hits)
        self._families += class_families(lambda: engine.stats.classes, name=self._name, labels=self._labels)
        self._families += tier_families(lambda: engine.stats.tiers, name=self._name, labels=self._labels)
        self._add_drafts(engine)

    def _add_drafts(self, engine: ServingEngine) -> None:
        count = self._count
        count("spec_decode_num_drafts", "Drafts that were verified", lambda: engine.stats.num_drafts)
        count("spec_decode_num_draft_tokens", "Tokens of drafts", lambda: engine.stats.num_draft_tokens)
        count(
            "spec_decode_num_accepted_tokens",
            "Tokens of drafts that were right",
            lambda: engine.stats.num_accepted_tokens,
        )
        count(
            "spec_decode_num_undrafted_requests",
            "Requests whose parameters rule out drafts",
            lambda: engine.stats.num_undrafted_requests,
        )

    def _add_counters(self) -> None:
        add = self._counter_each
        self._prompt_tokens = add("prompt_tokens", "Prompt tokens of requests that got a first token", [{}])[0]
        self._generation_tokens = add("generation_tokens", "Tokens generated", [{}])[0]
        self._prefetches = [
            add(name, text, [{}])[0]
            for name, text in (
                ("prefetch_requests", "Calls of /v1/prefetch that were answered"),
                ("prefetch_tokens", "Tokens of the prefixes that they named"),
                ("prefetch_cached_tokens", "Those of them that the device had"),
                ("prefetch_prefetched_tokens", "Those of them that were asked for from lower tiers"),
            )
        ]
        reasons = [{"finished_reason": reason.value} for reason in FinishReason]
        ended = add("request_success", "Requests that ended", reasons)
        self._ended = dict(zip(FinishReason, ended, strict=True))

    def _add_plans(self, book: BookFacts | None) -> None:
        plans = () if book is None else book.plans
        digest = "" if book is None else book.digest
        infos = [{"name": plan.name, "digest": plan.digest, "book": digest} for plan in plans]
        self._info("plan_info", "The plans of the plan book, in labels", infos)
        names = [{"plan": plan.name, "digest": plan.digest} for plan in plans]
        counters = self._counter_each("iterations", "Iterations that a plan ran", names)
        self._iterations = {plan.digest: counter for plan, counter in zip(plans, counters, strict=True)}

    def _add_latencies(self) -> None:
        add = self._histogram
        self._first_token_s = add("time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN_BUCKETS_S)
        self._next_token_s = add("inter_token_latency_seconds", "Gap between two tokens", TOKEN_BUCKETS_S)
        self._per_token_s = add("request_time_per_output_token_seconds", "Mean gap of a request", TOKEN_BUCKETS_S)
        self._e2e_s = add("e2e_request_latency_seconds", "Arrival to end", REQUEST_BUCKETS_S)
        self._queue_s = add("request_queue_time_seconds", "Arrival to admission", REQUEST_BUCKETS_S)
        self._prefill_s = add("request_prefill_time_seconds", "Admission to first token", REQUEST_BUCKETS_S)
        self._decode_s = add("request_decode_time_seconds", "First to last token", REQUEST_BUCKETS_S)
        self._inference_s = add("request_inference_time_seconds", "Admission to last token", REQUEST_BUCKETS_S)

    def _add_sizes(self, token_buckets: Buckets) -> None:
        add = self._histogram
        self._iteration_tokens = add(
            "iteration_tokens_total", "Prompt tokens computed and tokens generated in an iteration", ITERATION_BUCKETS
        )
        self._request_prompt_tokens = add("request_prompt_tokens", "Prompt tokens of a request", token_buckets)
        self._request_tokens = add("request_generation_tokens", "Tokens generated for a request", token_buckets)
        self._longest_completion = add(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion", token_buckets
        )
        self._params_max_tokens = add("request_params_max_tokens", "max_tokens of a request", token_buckets)
        self._params_n = add("request_params_n", "n of a request", CHOICES_BUCKETS)
        self._request_preemptions = add("request_num_preemptions", "Preemptions of a request", PREEMPTIONS_BUCKETS)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read from the engine's state."""

        def family(_total: Floats) -> Metric:
            gauge = GaugeMetricFamily(self._name(name), text, labels=LABELS)
            gauge.add_metric(self._values(), read())
            return gauge

        self._families.append(family)

    def _count(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a counter that the engine keeps."""

        def family(_total: Floats) -> Metric:
            counter = CounterMetricFamily(self._name(name), text, labels=LABELS)
            counter.add_metric(self._values(), read())
            return counter

        self._families.append(family)

    def _info(self, name: str, text: str, infos: Sequence[Mapping[str, object]]) -> None:
        """Add an info metric: series of value 1 whose labels carry the information."""

        def family(_total: Floats) -> Metric:
            gauge = GaugeMetricFamily(self._name(name), text, labels=(*LABELS, *(infos[0] if infos else ())))
            for info in infos:
                gauge.add_metric(self._values(info), 1)
            return gauge

        self._families.append(family)

    def _counter_each(self, name: str, text: str, labels: Sequence[Mapping[str, object]]) -> list[Counter]:
        """Add one counter for each set of further labels."""
        counters = [Counter(self._counters) for _ in labels]

        def family(total: Floats) -> Metric:
            counts = CounterMetricFamily(self._name(name), text, labels=(*LABELS, *(labels[0] if labels else ())))
            for counter, more in zip(counters, labels, strict=True):
                counts.add_metric(self._values(more), float(total[counter.place][0]))
            return counts

        self._families.append(family)
        return counters

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Histogram:
        """Add a histogram."""
        observed = Histogram(self._counters, buckets)
        bounds = [*map(floatToGoString, observed.bounds), "+Inf"]

        def family(total: Floats) -> Metric:
            *counts, total_value = total[observed.place].tolist()
            histogram = HistogramMetricFamily(self._name(name), text, labels=LABELS)
            histogram.add_metric(self._values(), list(zip(bounds, accumulate(counts), strict=True)), total_value)
            return histogram

        self._families.append(family)
        return observed

    def _values(self, more: Mapping[str, object] | None = None) -> list[str]:
        return [*self._labels.values(), *map(str, (more or {}).values())]

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{name}"


def _limits_labels(limits: EngineLimits) -> dict[str, object]:
    return {
        "goal": limits.goal,
        "max_batch_tokens": limits.max_batch_tokens,
        "max_batch_tokens_origin": limits.max_batch_tokens_origin,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_seqs_origin": limits.max_num_seqs_origin,
        "max_itl_ms": "none" if limits.max_itl_ms is None else f"{limits.max_itl_ms:g}",
        "max_itl_ms_origin": limits.max_itl_ms_origin,
        "reason": limits.reason,
    }
