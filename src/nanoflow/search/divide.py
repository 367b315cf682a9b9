"""Stage 2 on one GPU: the device is divided in two once for the whole layer, and the tasks are ordered anew for it.

Products are on one part, what is bound by memory on the other. The paper instead keeps the order of stage 1 and gives
each task a share of its own (`allocate.py`). With measured interference that was worse in every batch compared, at many
times the cost (docs/log/2026-11-29-one-path-of-the-search.md): here the order suits the times on the parts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from nanoflow.graph.operation import OpKind, Resource
from nanoflow.plan.mechanisms import Mechanism, ShareOrigin
from nanoflow.profile.interference import Interference
from nanoflow.search.problem import Problem, Task, has_collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A device divided in two for a whole layer: products on one part, everything else on the other.

    Attributes:
        mechanism, share: How, and the share of the products.
        problem: The tasks, each with its time on its part. They have yet to be ordered.
        shares: Of every task.
        least_period_s: What a layer takes at least, if no task waits for another.
    """

    mechanism: Mechanism
    share: float
    problem: Problem
    shares: tuple[float, ...]
    least_period_s: float

    @property
    def name(self) -> str:
        """In words."""
        prefills = {task.group.resource for task in self.problem.tasks if _is_prefill(task)}
        return f"{self.mechanism} {self.share:.2f}" + (", attentions together" if Resource.MEMORY in prefills else "")


def divisions(
    problem: Problem, interference: Interference, mechanisms: Collection[Mechanism] | None = None
) -> list[Division]:
    """Every way to divide the device that pairs were measured with, the shortest `least_period_s` first.

    Prefill attention has two places: with the products, or on the part of decode attention, one after the other.
    Whichever makes the two parts more even comes first.

    Args:
        problem: The tasks. With collectives there is no way to divide: they would need a third part.
        interference: The pairs.
        mechanisms: Which ones; by default those whose shares can be had, and are not a result of the measurement.
    """
    if has_collectives(problem):
        return []
    if mechanisms is None:
        mechanisms = [each for each in interference.mechanisms if each.traits.share_origin is not ShareOrigin.RESULT]
    found = [
        _divide(variant, interference, mechanism, share)
        for variant in dict.fromkeys((problem, _attentions_together(problem)))
        for mechanism in mechanisms
        for share in interference.shares(mechanism, Resource.COMPUTE)
        if share < 1.0
    ]
    return sorted(found, key=lambda division: division.least_period_s)


def _attentions_together(problem: Problem) -> Problem:
    """The problem with prefill attention on the lane of decode attention."""
    tasks = tuple(
        replace(task, group=replace(task.group, resource=Resource.MEMORY))
        if _is_prefill(task) and task.cost.time_s > 0
        else task
        for task in problem.tasks
    )
    return replace(problem, tasks=tasks)


def _is_prefill(task: Task) -> bool:
    return task.group.operations[0].kind is OpKind.PREFILL_ATTENTION


def _divide(problem: Problem, interference: Interference, mechanism: Mechanism, share: float) -> Division:
    shares = tuple(share if task.group.resource is Resource.COMPUTE else 1.0 - share for task in problem.tasks)
    tasks = []
    alone_s, shared_s = dict.fromkeys(Resource, 0.0), dict.fromkeys(Resource, 0.0)
    for task, part in zip(problem.tasks, shares, strict=True):
        main = next(op for op in task.group.operations if op.name == task.group.name)
        time_s = task.cost.time_s / interference.performance(mechanism, main, part, task.tokens.num_tokens)
        tasks.append(replace(task, cost=replace(task.cost, time_s=time_s)))
        alone_s[task.group.resource] += task.cost.time_s
        shared_s[task.group.resource] += time_s
    longer = max(shared_s, key=lambda resource: shared_s[resource])
    until_s = shared_s[Resource.MEMORY if longer is Resource.COMPUTE else Resource.COMPUTE]
    # What is left of the longer part then runs alone: on its share, or on the whole device.
    left_s = (shared_s if mechanism.traits.keeps_share else alone_s)[longer] * (1.0 - until_s / shared_s[longer])
    return Division(
        mechanism=mechanism,
        share=share,
        problem=replace(problem, tasks=tuple(tasks)),
        shares=shares,
        least_period_s=until_s + left_s,
    )
