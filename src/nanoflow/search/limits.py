"""Under which limits of an engine a workload is fastest: its token budget and the number of requests at once.

Overlap wants other limits than running in sequence does. Large budgets spare launches and idle waves, but prompts then
come in bursts, so that decodes are often alone and have nothing to run beside. So both are compared at their best: the
sequential plan under all limits, which is cheap to simulate, and plans under the few limits that could win with them.
What a run takes is the caller's to say; here is what to ask, and what follows from the answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nanoflow.config import ConfigError
from nanoflow.graph.operation import Resource
from nanoflow.plan.book import BookLimits
from nanoflow.profile.table import Profile
from nanoflow.search.books import FoundPlan

# What is tried where the user gives no number.
TOKEN_BUDGETS = (1024, 2048, 4096, 8192, 16384)
REQUEST_COUNTS = (256, 512, 1024, 2048)
# Limits that plans are searched for under, at most; the best sequential ones are always among them.
MAX_SEARCHED = 4
# Limits under which plans are tried, and how far apart predictions of two may be that trials could exchange.
_MOST_TRIED, _OFF_BY = 3, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A whole run of a workload under some limits.

    Attributes:
        tokens_per_s: Prompt and output tokens, per GPU.
        peak_requests: Most requests that ran at once: larger limits than that change nothing.
        bound_tokens_per_s: What overlap could make of it at best (`OverlapBound`); `tokens_per_s` if not known.
    """

    tokens_per_s: float
    peak_requests: int
    bound_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsFound:
    """Runs of all workloads, in their order, under some limits."""

    limits: BookLimits
    runs: tuple[Run, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens a second and GPU of each workload."""
        return tuple(run.tokens_per_s for run in self.runs)

    @property
    def rate(self) -> float:
        """Geometric mean, so that no workload counts more because its tokens are cheap."""
        return _mean(self.rates)

    @property
    def bound(self) -> float:
        """The same of the bounds."""
        return _mean([run.bound_tokens_per_s for run in self.runs])


@dataclass(frozen=True, slots=True, kw_only=True)
class WithPlans:
    """What plans make of the runs of all workloads under some limits.

    Attributes:
        limits: The limits.
        rates: Tokens a second and GPU of each workload.
        plans: What was found for each kind of batch.
    """

    limits: BookLimits
    rates: tuple[float, ...]
    plans: tuple[FoundPlan, ...]

    @property
    def rate(self) -> float:
        """Geometric mean."""
        return _mean(self.rates)


def largest_measured(profile: Profile) -> int:
    """Tokens of the largest batch whose operations a profile has: of the largest product on the whole device."""
    sizes: dict[str, int] = {}
    for point in profile.points:
        sizes[point.operation] = max(sizes.get(point.operation, 0), point.num_tokens)
    return max(sizes.values(), default=0)


def limits_to_try(
    profile: Profile, budgets: Sequence[int] | None, requests: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Token budgets and numbers of requests, increasing; those that are given, else what the profile covers.

    Raises:
        ConfigError: A budget that is given is larger than what was measured.
    """
    most = largest_measured(profile)
    too_large = [budget for budget in budgets or () if budget > most]
    if too_large:
        raise ConfigError(
            f"max_batch_tokens {too_large[0]} is beyond the profile, which has operations of up to {most} tokens: "
            f"extend it with nanoflow profile --max-batch-tokens {too_large[0]}, or give at most {most}"
        )
    known = [budget for budget in TOKEN_BUDGETS if budget <= most] or [most]
    return sorted(set(budgets or known)), sorted(set(requests or REQUEST_COUNTS))


def swept(
    budgets: Sequence[int], requests: Sequence[int], run_all: Callable[[BookLimits], tuple[Run, ...]]
) -> Iterator[LimitsFound]:
    """The sequential plan under each budget with each number of requests; those that change nothing are left out.

    Args:
        budgets, requests: Increasing.
        run_all: The runs of all workloads under some limits.
    """
    for budget in budgets:
        # Each request that runs has a token in an iteration, or waits for one.
        for count in [count for count in requests if count <= budget] or requests[:1]:
            limits = BookLimits(max_batch_tokens=budget, max_num_seqs=count)
            runs = run_all(limits)
            yield LimitsFound(limits=limits, runs=runs)
            if all(run.peak_requests < count for run in runs):
                break


def fastest(found: Sequence[LimitsFound]) -> LimitsFound:
    """Those with the best rate; of equal ones the first, which are the smallest."""
    return max(found, key=lambda each: each.rate)


def worth_searching(found: Sequence[LimitsFound]) -> list[LimitsFound]:
    """Limits under which plans might beat the best sequential run: those whose bound is highest, that one first."""
    best = fastest(found)
    others = [each for each in found if each is not best and each.bound > best.rate]
    return [best, *sorted(others, key=lambda each: -each.bound)[: MAX_SEARCHED - 1]]


def strongest(found: Sequence[WithPlans], best: LimitsFound) -> list[WithPlans]:
    """Of what is predicted, the best one first, what might still be best when it is tried.

    Left out is what is predicted to lose to the best by more than a prediction is off by, or to the sequential plan.
    """
    ordered = sorted(found, key=lambda each: -each.rate)
    least = max(ordered[0].rate * (1.0 - _OFF_BY), best.rate)
    return [each for each in ordered[:_MOST_TRIED] if each.rate > least] or ordered[:1]


class OverlapBound:
    """How much of an iteration's time overlap could save at best, from the pairs of a profile.

    While two operations run side by side at P1 and P2 of their speeds, P1 + P2 - 1 of the time is saved. That lasts
    until the shorter one has ended. Of every two resources the pair that saves most counts; what a plan makes of it is
    less.
    """

    def __init__(self, profile: Profile, resource_of: Mapping[str, Resource]) -> None:
        self._pairs: dict[tuple[Resource, Resource], list[tuple[float, float]]] = {}
        for pair in profile.pairs:
            first, second = resource_of.get(pair.first, Resource.COMPUTE), resource_of.get(pair.second)
            if second is not None and pair.second_performance > 0 and first is not second:
                found = self._pairs.setdefault((first, second), [])
                found.append((pair.first_performance, pair.second_performance))

    def saved_s(self, busy_s: Mapping[Resource, float]) -> float:
        """Seconds saved of an iteration in which each resource is busy for so long."""
        saved_s = sum(
            max(_saved_s(busy_s.get(first, 0.0), busy_s.get(second, 0.0), *each) for each in pairs)
            for (first, second), pairs in self._pairs.items()
        )
        return min(saved_s, sum(busy_s.values()) - max(busy_s.values(), default=0.0))


def _saved_s(first_s: float, second_s: float, first_performance: float, second_performance: float) -> float:
    together_s = min(first_s / first_performance, second_s / second_performance)
    return max(together_s * (first_performance + second_performance - 1.0), 0.0)


def _mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))
