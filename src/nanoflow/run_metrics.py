"""Metrics of a benchmark run: pure functions from the times of its requests to rates and distributions.

TTFT is arrival to first token; TPOT is (latency - TTFT) / (tokens - 1); ITL is the gap between tokens; normalized
latency is latency / output tokens; goodput is the requests/s that meet every stated limit. Times are in seconds, except
that limits, which people write, are in milliseconds. `bench/offline.py` and `bench/online.py` take the times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.compat.unknown import unknown_option
from nanoflow.config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyState:
    """Rate and energy of a run in its measurement window (`bench/measurement_window.py`).

    Attributes:
        duration_s, num_iterations: Length of the window.
        total_tokens_per_s: Prompt and output tokens that the model computed. A window with a larger share of prompt
            tokens than the workload may be faster than the workload's bounds, so it is not compared with them.
        energy_per_token_j: None if unknown, or if the window is too short for the counter.
    """

    duration_s: float
    num_iterations: int
    total_tokens_per_s: float
    energy_per_token_j: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What happened to one request; times in seconds of one clock.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_requested_tokens: Tokens asked for.
        num_output_tokens: Tokens received.
        arrival_s, first_token_s, finished_s: Times; without meaning if the request failed. `first_token_s` is None if
            the whole answer came at once.
        gaps_s: Gaps between deliveries of tokens; empty if they were not measured.
        error: Why the request failed; None if it completed.
    """

    num_prompt_tokens: int
    num_requested_tokens: int
    num_output_tokens: int = 0
    arrival_s: float = 0.0
    first_token_s: float | None = 0.0
    finished_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles (with linear interpolation) of some values."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """Metrics of one repeat of a benchmark. Token counts and rates count completed requests only.

    Attributes:
        num_requests, num_completed, num_failed: Numbers of requests.
        num_short: Completed requests with fewer tokens than asked for. With any, the run is not comparable.
        duration_s: From the start to the last finish.
        num_prompt_tokens, num_output_tokens: Sums over the requests.
        total_tokens_per_s, output_tokens_per_s, requests_per_s: Over the duration; total is prompt plus output.
        ttft_s, tpot_s, itl_s, latency_s, normalized_latency_s: None where nothing was measured. ITL is the gap between
            two deliveries, each of which may bring several tokens.
        longest_gap_s: Distribution of each request's longest ITL.
        goodput_requests_per_s: None unless limits were stated.
        energy_per_token_j: Energy of the GPU over the duration, for each prompt and output token; None if unknown.
        errors: Message to how often.
        share_of_serial, share_of_optimal: Total tokens/s as a part of the bounds; None if these were not measured.
        steady: In the measurement window; None if iterations were not observed, or for the reason given.
        no_steady_reason: Why there was no measurement window; None if there was one or nothing was observed.
        plan_iterations: A plan's digest to the iterations it ran; None if nobody watched.
        energy_dropped: Why an energy that was measured is not told; None if none was dropped.
    """

    num_requests: int
    num_completed: int
    num_failed: int
    num_short: int
    duration_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    total_tokens_per_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    latency_s: Distribution | None
    normalized_latency_s: Distribution | None
    goodput_requests_per_s: float | None
    energy_per_token_j: float | None
    errors: Mapping[str, int]
    share_of_serial: float | None = None
    share_of_optimal: float | None = None
    steady: SteadyState | None = None
    no_steady_reason: str | None = None
    plan_iterations: Mapping[str, int] | None = None
    longest_gap_s: Distribution | None = None
    energy_dropped: str | None = None


def ttft_s(record: RequestRecord) -> float | None:
    """Arrival to first token; None if the time of the first token is unknown."""
    return None if record.first_token_s is None else record.first_token_s - record.arrival_s


def latency_s(record: RequestRecord) -> float:
    """Arrival to last token."""
    return record.finished_s - record.arrival_s


def tpot_s(record: RequestRecord) -> float | None:
    """Seconds for each token after the first; None for fewer than two tokens or an unknown time of the first."""
    if record.num_output_tokens < 2 or record.first_token_s is None:
        return None
    return (record.finished_s - record.first_token_s) / (record.num_output_tokens - 1)


def normalized_latency_s(record: RequestRecord) -> float:
    """Latency divided by the number of output tokens."""
    return latency_s(record) / record.num_output_tokens


def longest_gap_s(record: RequestRecord) -> float | None:
    """The longest ITL; None if there is no gap."""
    return max(record.gaps_s, default=None)


_LIMITED: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft_ms": ttft_s,
    "tpot_ms": tpot_s,
    "itl_ms": longest_gap_s,
    "latency_ms": latency_s,
    "normalized_latency_ms": normalized_latency_s,
}


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """Limits such as `ttft_ms:200` as a mapping from name to milliseconds.

    Raises:
        ConfigError: A limit has an unknown name, or its number is not positive.
    """
    limits_ms: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition(":")
        if name not in _LIMITED:
            raise ConfigError(f"goodput: {unknown_option(name, list(_LIMITED))}")
        try:
            limits_ms[name] = float(number)
        except ValueError:
            raise ConfigError(f"goodput: {text!r} must be {name}:MILLISECONDS") from None
        if not limits_ms[name] > 0:
            raise ConfigError(f"goodput: {name} must be positive, got {number}")
    return limits_ms


def meets(record: RequestRecord, limits_ms: Mapping[str, float]) -> bool:
    """True if the request completed and every measured time of it is within its limit."""
    if record.error is not None:
        return False
    measured = ((_LIMITED[name](record), limit_ms) for name, limit_ms in limits_ms.items())
    return all(value_s is None or value_s * 1e3 <= limit_ms for value_s, limit_ms in measured)


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Mean and percentiles of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(present, (50, 90, 99)))
    return Distribution(mean=float(np.mean(present)), p50=p50, p90=p90, p99=p99)


def measure(
    records: Sequence[RequestRecord],
    duration_s: float,
    limits_ms: Mapping[str, float],
    *,
    energy_j: float | None = None,
) -> RunMetrics:
    """The metrics of one repeat that took `duration_s` seconds and `energy_j` joules (None if not measured)."""
    done = [record for record in records if record.error is None]
    errors = Counter(record.error for record in records if record.error is not None)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in done)
    num_output_tokens = sum(record.num_output_tokens for record in done)
    return RunMetrics(
        num_requests=len(records),
        num_completed=len(done),
        num_failed=len(records) - len(done),
        num_short=sum(record.num_output_tokens < record.num_requested_tokens for record in done),
        duration_s=duration_s,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        total_tokens_per_s=(num_prompt_tokens + num_output_tokens) / duration_s,
        output_tokens_per_s=num_output_tokens / duration_s,
        requests_per_s=len(done) / duration_s,
        ttft_s=distribution(map(ttft_s, done)),
        tpot_s=distribution(map(tpot_s, done)),
        itl_s=distribution(gap_s for record in done for gap_s in record.gaps_s),
        longest_gap_s=distribution(map(longest_gap_s, done)),
        latency_s=distribution(map(latency_s, done)),
        normalized_latency_s=distribution(map(normalized_latency_s, done)),
        goodput_requests_per_s=sum(meets(record, limits_ms) for record in records) / duration_s if limits_ms else None,
        energy_per_token_j=None if energy_j is None else energy_j / max(num_prompt_tokens + num_output_tokens, 1),
        errors=dict(errors.most_common()),
    )
