"""Metrics for Prometheus: observes the engine's front end and renders what it saw.

Names (after the prefix), labels and buckets are those that dashboards for LLM servers expect. Knows no HTTP; the engine
calls the observer methods with plain numbers (`engine/observer.py`). Gauges are read when asked for, so that
they are right in an idle engine too.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nanoflow.engine.messages import BookFacts, EngineStats
from nanoflow.engine.observer import FinishedRequest
from nanoflow.outputs import FinishReason
from nanoflow.server.backend import ServingEngine

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


def token_count_buckets(max_model_len: int) -> Buckets:
    """1, 2, 5, 10, 20, 50, ... up to the context length."""
    steps = (digit * 10**zeros for zeros in range(len(str(max_model_len))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= max_model_len)


class ServerMetrics:
    """Metrics of one engine on a registry of their own.

    Args:
        engine: Asked for its state when metrics are read.
        prefix: Before each name, with a colon.
        model_name: Label of each series.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: ServingEngine, *, prefix: str, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._num_preemptions_seen = 0
        self._add_gauges(engine)
        self._add_counters()
        self._add_plans(engine.facts.book)
        self._add_latencies()
        self._add_sizes(token_count_buckets(engine.facts.max_model_len))

    def observe_step(self, stats: EngineStats) -> None:
        """An iteration has ended."""
        self._iteration_tokens.observe(stats.iteration_tokens)
        self._preemptions.inc(max(stats.num_preemptions - self._num_preemptions_seen, 0))
        self._num_preemptions_seen = stats.num_preemptions
        if stats.plan_digest is not None:
            self._iterations[stats.plan_digest].inc()

    def observe_first_token(self, ttft_s: float, num_prompt_tokens: int) -> None:
        """A request got the first token of any of its completions."""
        self._first_token_s.observe(ttft_s)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc()

    def observe_next_tokens(self, latencies_s: Sequence[float]) -> None:
        """Completions got a token that is not their first."""
        for latency_s in latencies_s:
            self._next_token_s.observe(latency_s)
        self._generation_tokens.inc(len(latencies_s))

    def observe_finished(self, request: FinishedRequest) -> None:
        """A request ended."""
        # The first tokens of the second and further completions were in no earlier observation.
        self._generation_tokens.inc(max(min(request.n, request.num_generated_tokens) - 1, 0))
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

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _add_gauges(self, engine: ServingEngine) -> None:
        running = self._gauge("num_requests_running", "Requests that hold KV pages")
        running.set_function(lambda: engine.stats.num_running)
        waiting = self._gauge("num_requests_waiting", "Requests that wait for admission")
        waiting.set_function(lambda: engine.stats.num_waiting)
        usage = self._gauge("kv_cache_usage_perc", "Part of the KV pages in use, 0 to 1")
        usage.set_function(lambda: engine.stats.pages_in_use / max(engine.stats.num_pages, 1))
        facts = engine.facts
        self._gauge(
            "cache_config_info",
            "The KV cache, in labels",
            block_size=facts.page_size,
            num_gpu_blocks=facts.num_pages,
            kv_cache_size_tokens=facts.page_size * facts.num_pages,
            cache_dtype=facts.dtype,
        ).set(1)
        limits = facts.limits
        if limits is not None:
            self._gauge(
                "limits_info",
                "The limits that were given or chosen at the start, in labels",
                goal=limits.goal,
                max_batch_tokens=limits.max_batch_tokens,
                max_batch_tokens_origin=limits.max_batch_tokens_origin,
                max_num_seqs=limits.max_num_seqs,
                max_num_seqs_origin=limits.max_num_seqs_origin,
                max_itl_ms="none" if limits.max_itl_ms is None else f"{limits.max_itl_ms:g}",
                max_itl_ms_origin=limits.max_itl_ms_origin,
                reason=limits.reason,
            ).set(1)

    def _add_counters(self) -> None:
        self._preemptions = self._counter("num_preemptions", "Times KV pages were taken back from a request")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got a first token")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated")
        names = (*LABELS, "finished_reason")
        ended = Counter(self._name("request_success"), "Requests that ended", names, registry=self._registry)
        self._ended = {reason: ended.labels(**self._labels, finished_reason=reason.value) for reason in FinishReason}

    def _add_plans(self, book: BookFacts | None) -> None:
        names = [*LABELS, "name", "digest", "book"]
        found = Gauge(self._name("plan_info"), "The plans of the plan book, in labels", names, registry=self._registry)
        names = [*LABELS, "plan", "digest"]
        run = Counter(self._name("iterations"), "Iterations that a plan ran", names, registry=self._registry)
        self._iterations: dict[str, Counter] = {}
        if book is None:
            return
        for plan in book.plans:
            found.labels(**self._labels, name=plan.name, digest=plan.digest, book=book.digest).set(1)
            self._iterations[plan.digest] = run.labels(**self._labels, plan=plan.name, digest=plan.digest)

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
        self._iteration_tokens = add("iteration_tokens_total", "Tokens of a dense batch", ITERATION_BUCKETS)
        self._request_prompt_tokens = add("request_prompt_tokens", "Prompt tokens of a request", token_buckets)
        self._request_tokens = add("request_generation_tokens", "Tokens generated for a request", token_buckets)
        self._longest_completion = add(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion", token_buckets
        )
        self._params_max_tokens = add("request_params_max_tokens", "max_tokens of a request", token_buckets)
        self._params_n = add("request_params_n", "n of a request", CHOICES_BUCKETS)
        self._request_preemptions = add("request_num_preemptions", "Preemptions of a request", PREEMPTIONS_BUCKETS)

    def _gauge(self, name: str, text: str, **more_labels: object) -> Gauge:
        gauge = Gauge(self._name(name), text, (*LABELS, *more_labels), registry=self._registry)
        return gauge.labels(**self._labels, **more_labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(self._name(name), text, LABELS, registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Histogram:
        histogram = Histogram(self._name(name), text, LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(**self._labels)

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{name}"
