"""Interactive requests and background ones on one device: what each class got, from the times of its requests.

Pure functions. `simulate/two_classes.py` and `benchmarks/engine/beside_batch.py` take the times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.run_metrics import Distribution, RequestRecord, distribution, ttft_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactive:
    """Interactive requests of a run.

    Attributes:
        num_requests: Those that completed.
        ttft_s, itl_s: Arrival to first token; gaps between tokens of a request. None where there are none.
    """

    num_requests: int
    ttft_s: Distribution | None
    itl_s: Distribution | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoClasses:
    """A measured or simulated comparison of both classes alone and together.

    Attributes:
        load: The interactive requests/s as a part of those that the device makes of them alone.
        alone, together: The interactive requests at that rate without background requests, and beside them.
        batch_alone_tokens_per_s: Prompt and output tokens/s of background requests that have the device to themselves.
        batch_tokens_per_s: The same beside the interactive requests, in the time in which these come.
        max_ttft_s, max_itl_s: The stated limits; None for none.
    """

    load: float
    alone: Interactive
    together: Interactive
    batch_alone_tokens_per_s: float
    batch_tokens_per_s: float
    max_ttft_s: float | None
    max_itl_s: float | None

    @property
    def share_of_rest(self) -> float:
        """Batch tokens/s over what the rest of the device would make: the part that interactive requests leave."""
        rest = max(1 - self.load, 0.0) * self.batch_alone_tokens_per_s
        return self.batch_tokens_per_s / rest if rest else 0.0


def interactive_of(records: Sequence[RequestRecord]) -> Interactive:
    """Latencies of requests that completed."""
    done = [record for record in records if record.error is None]
    return Interactive(
        num_requests=len(done),
        ttft_s=distribution(map(ttft_s, done)),
        itl_s=distribution(gap_s for record in done for gap_s in record.gaps_s),
    )


def tokens_per_s(records: Sequence[RequestRecord], start_s: float, stop_s: float) -> float:
    """Prompt and output tokens/s between two times; the tokens of a prompt count when its first token is there."""
    num_tokens = 0
    for record in records:
        if record.first_token_s is None or record.error is not None:
            continue
        times_s = record.first_token_s + np.cumsum((0.0, *record.gaps_s))
        num_tokens += int(np.count_nonzero((times_s >= start_s) & (times_s < stop_s)))
        if start_s <= record.first_token_s < stop_s:
            num_tokens += record.num_prompt_tokens
    return num_tokens / (stop_s - start_s)


def table(found: TwoClasses) -> Iterator[str]:
    """The comparison in lines, for people."""
    yield f"{'interactive':<22}{'TTFT p50':>10}{'p99':>9}{'ITL p50':>10}{'p99':>9}   (ms)"
    for name, one in (("alone", found.alone), ("beside batch", found.together)):
        shown = (f"{_ms(value):>{width}}" for value, width in _latencies(one))
        yield f"  {name:<20}{''.join(shown)}"
    limits = (found.max_ttft_s, found.max_itl_s)
    ttft, itl = ("none" if limit is None else f"{limit * 1e3:,.0f}" for limit in limits)
    yield f"  {'limit':<20}{ttft:>19}{itl:>19}"
    yield f"  load{'':<16}{found.load:>10.0%} of what the device makes of them alone"
    yield "batch"
    yield f"  {'alone':<20}{found.batch_alone_tokens_per_s:>10,.0f} tokens/s"
    yield f"  {'beside interactive':<20}{found.batch_tokens_per_s:>10,.0f} tokens/s"
    yield f"  {'share of the rest':<20}{found.share_of_rest:>10.0%} of what the rest of the device would make"


def _latencies(one: Interactive) -> Iterator[tuple[float | None, int]]:
    for kind, first in ((one.ttft_s, 10), (one.itl_s, 10)):
        yield (None if kind is None else kind.p50), first
        yield (None if kind is None else kind.p99), 9


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:,.1f}"
