"""Policies of the scheduler compared in simulated runs: every choice of admission, preemption and queue, one table.

What each of them is stands in `scheduler/policies.py`; here are their names, which of their combinations need a run,
and which of them wins. Lengths of completions should not be known to the scheduler (`Cluster.max_tokens`), or all ways
to expect them are alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from nanoflow.run_metrics import RunMetrics
from nanoflow.scheduler.policies import (
    Expect,
    Policies,
    Victim,
    expect_held,
    expect_learnt,
    expect_most,
    expect_next,
    loads_for_new,
    longest_remaining,
    newest,
    up_to_first_load,
)
from nanoflow.scheduler.reuse import Queueing, loads_for_all, without_loads

ADMISSIONS: Mapping[str, Expect] = {
    "predicted": expect_learnt,
    "held": expect_held,
    "reserved": expect_most,
    "now": expect_next,
}
RETURNS = {"swap": loads_for_all, "recompute": loads_for_new}
VICTIMS: Mapping[str, Victim] = {"newest": newest, "longest": longest_remaining}
QUEUES = {"overtake": (without_loads, Queueing().most_passed), "in order": (up_to_first_load, 0)}

# Runs whose tokens/s, or latencies, differ by less than this part are alike.
_ALIKE = 0.01


class Ran(Protocol):
    """What a run tells; `SimulatedRun` does."""

    @property
    def metrics(self) -> RunMetrics:
        """Of its requests."""

    @property
    def num_preemptions(self) -> int:
        """Of all replicas."""

    @property
    def num_loads(self) -> int:
        """Of all replicas."""


RanT = TypeVar("RanT", bound=Ran)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One policy of each kind, by name.

    Attributes:
        admission: Who is let in: by what is *predicted* from requests that have ended, with all that each may generate
            *reserved*, or by what is needed *now*.
        returns: How one that was sent back gets its pages: by a *swap* through host memory, or by *recompute*.
        victim: Who is sent back: the *newest*, or the one with the *longest* expected rest.
        queue: Whether others *overtake* one whose pages are being loaded, or all go *in order*.
    """

    admission: str = "predicted"
    returns: str = "swap"
    victim: str = "newest"
    queue: str = "overtake"

    @property
    def policies(self) -> Policies:
        """As the scheduler takes them."""
        ready, most_passed = QUEUES[self.queue]
        return Policies(
            expect=ADMISSIONS[self.admission],
            victim=VICTIMS[self.victim],
            queueing=Queueing(below=RETURNS[self.returns], ready=ready, most_passed=most_passed),
        )


def choices() -> Iterator[Choice]:
    """All of them; what an engine without lower tiers does is the first."""
    for admission, queue, returns, victim in itertools.product(ADMISSIONS, QUEUES, RETURNS, VICTIMS):
        yield Choice(admission=admission, returns=returns, victim=victim, queue=queue)


def compare(run: Callable[[Policies], RanT]) -> dict[Choice, RanT]:
    """A run for each choice, or the run of another choice where both must be the same.

    Where nobody is sent back it does not matter who would be nor how it would return; where nothing is loaded nobody
    can be overtaken.
    """
    found: dict[Choice, RanT] = {}
    for choice in choices():
        same = next((ran for twin, ran in found.items() if _is_same(choice, twin, ran)), None)
        found[choice] = same or run(choice.policies)
    return found


def _is_same(choice: Choice, twin: Choice, ran: Ran) -> bool:
    """Whether a choice must run as another one did, as the two differ only in what never happened there."""
    differs_in_queue = choice.queue != twin.queue
    differs_in_return = (choice.returns, choice.victim) != (twin.returns, twin.victim)
    return (
        choice.admission == twin.admission
        and not (differs_in_queue and ran.num_loads)
        and not (differs_in_return and ran.num_preemptions)
    )


def best(runs: Mapping[Choice, Ran]) -> Choice:
    """The fastest; of those about as fast the one with the lowest latency a token; of those alike the first."""
    most = max(ran.metrics.total_tokens_per_s for ran in runs.values())
    fast = [choice for choice, ran in runs.items() if ran.metrics.total_tokens_per_s >= (1 - _ALIKE) * most]
    least_s = min(_latency_s(runs[choice]) for choice in fast)
    return next(choice for choice in fast if _latency_s(runs[choice]) <= (1 + _ALIKE) * least_s)


def _latency_s(ran: Ran) -> float:
    found = ran.metrics.normalized_latency_s
    return found.mean if found is not None else 0.0


def table(runs: Mapping[Choice, Ran]) -> Sequence[str]:
    """A line for each choice, the winner marked with *, as ratios of the first."""
    base = next(iter(runs.values())).metrics.total_tokens_per_s
    winner = best(runs)
    head = (
        f"  {'admission':<11}{'return':<11}{'victim':<9}{'queue':<10}{'tokens/s':>10}{'ratio':>7}"
        f"{'TTFT p50':>11}{'p99 (s)':>9}{'ms/token':>10}{'preempted':>11}{'loads':>8}"
    )
    return [head, *(_line(choice, ran, base, is_best=choice == winner) for choice, ran in runs.items())]


def _line(choice: Choice, ran: Ran, base: float, *, is_best: bool) -> str:
    metrics = ran.metrics
    ttft = (0.0, 0.0) if metrics.ttft_s is None else (metrics.ttft_s.p50, metrics.ttft_s.p99)
    return (
        f"{'*' if is_best else ' '} {choice.admission:<11}{choice.returns:<11}{choice.victim:<9}{choice.queue:<10}"
        f"{metrics.total_tokens_per_s:>10,.0f}{metrics.total_tokens_per_s / base:>7.3f}"
        f"{ttft[0]:>11,.2f}{ttft[1]:>9,.2f}{_latency_s(ran) * 1e3:>10,.1f}{ran.num_preemptions:>11,}{ran.num_loads:>8,}"
    )
