"""Both stages of the search on small cases, against exhaustive enumeration that shares no formula with them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import milp

from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import BatchShape, Operation, Resource
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.interference import Interference
from nanoflow.profile.table import Cost, PairPoint, Profile, Setup
from nanoflow.search import structure
from nanoflow.search.allocate import allocate
from nanoflow.search.divide import divisions
from nanoflow.search.problem import Edge, Group, Problem, Task
from nanoflow.search.structure import Effort, Program, Schedule, Solution, solve_structure

GRAPH = build_graph(preset_config("llama-3-8b"), None)
OPS = {op.name: op for op in GRAPH.layer}
EFFORT = Effort(num_nodes=100_000, time_limit_s=60)
SETUP = Setup(gpu="test", memory_bytes=1e9)


def problem(durations: Sequence[tuple[str, int, float]], edges: Sequence[tuple[int, int, int]]) -> Problem:
    """Tasks as (operation, nano-batch, seconds)."""
    tasks = tuple(
        Task(
            group=group_of(OPS[name]), tokens=TokenRange(start=128 * at, stop=128 * at + 128), cost=Cost(time_s=time_s)
        )
        for name, at, time_s in durations
    )
    found = tuple(Edge(first=first, second=second, distance=distance) for first, second, distance in edges)
    return Problem(graph=GRAPH, shape=BatchShape(num_tokens=256), tasks=tasks, edges=found)


def group_of(op: Operation) -> Group:
    resource = Resource.MEMORY if op.name == "decode_attention" else Resource.COMPUTE
    return Group(name=op.name, operations=(op,), resource=resource)


def chain(times: Sequence[float]) -> Problem:
    """Two nano-batches of: product, attention, product; the next layer's first product follows the last one."""
    names = ("qkv_proj", "decode_attention", "down_proj")
    durations = [(name, half, times[2 * place + half]) for place, name in enumerate(names) for half in (0, 1)]
    edges = [(2 * place + half, 2 * place + 2 + half, 0) for place in (0, 1) for half in (0, 1)]
    return problem(durations, [*edges, (4, 0, 1), (5, 1, 1)])


def least_period(case: Problem) -> float:
    """The best period over every cyclic order of the tasks on each resource, by longest paths."""
    lanes = [
        [place for place, task in enumerate(case.tasks) if task.group.resource is resource]
        for resource in (Resource.COMPUTE, Resource.MEMORY)
    ]
    return min(
        shortest(case, [*first, *second]) for first in cyclic_orders(lanes[0]) for second in cyclic_orders(lanes[1])
    )


def cyclic_orders(lane: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Consecutive pairs with the periods between them, one period in all."""
    head, *tail = lane
    for order in itertools.permutations(tail):
        ring = [head, *order]
        pairs = list(zip(ring, [*order, head], strict=True))
        for periods in itertools.product((-1, 0, 1, 2), repeat=len(ring)):
            if sum(periods) == 1:
                yield [(first, second, count) for (first, second), count in zip(pairs, periods, strict=True)]


def shortest(case: Problem, orders: Sequence[tuple[int, int, int]]) -> float:
    """The least period for which no cycle of waiting is longer than its periods; infinite if there is none."""
    arcs = [*orders, *((edge.first, edge.second, edge.distance) for edge in case.edges)]
    low, high = 0.0, sum(task.cost.time_s for task in case.tasks)
    if not is_feasible(case, arcs, high):
        return float("inf")
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if is_feasible(case, arcs, middle) else (middle, high)
    return high


def is_feasible(case: Problem, arcs: Sequence[tuple[int, int, int]], period: float) -> bool:
    starts = [0.0] * len(case.tasks)
    for _ in range(len(starts) + 1):
        changed = False
        for first, second, periods in arcs:
            earliest = starts[first] + case.tasks[first].cost.time_s - periods * period
            if earliest > starts[second] + 1e-9:
                starts[second], changed = earliest, True
        if not changed:
            return True
    return False


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_the_best_of_all(seed: int) -> None:
    times = [random.Random(seed).choice((1.0, 2.0, 3.0, 5.0)) for _ in range(6)]
    case = chain(times)
    found = solve_structure(case, max_stages=3, effort=EFFORT)
    assert found is not None
    assert found.period_s == pytest.approx(least_period(case), rel=1e-3), times
    assert found.gap == pytest.approx(0.0, abs=1e-3)


def test_what_overlaps_perfectly_takes_as_long_as_the_busiest_resource() -> None:
    found = solve_structure(chain([1, 1, 4, 4, 3, 3]), max_stages=3, effort=EFFORT)
    assert found is not None and found.period_s == pytest.approx(8.0)


def test_the_solver_is_bounded_by_nodes_so_that_results_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for a machine that is too slow; on any other it is the number of nodes that ends a program."""
    asked: list[dict[str, float]] = []

    def noted(*args: Any, options: dict[str, float], **kwargs: Any) -> Any:
        asked.append(dict(options))
        return milp(*args, options=options, **kwargs)

    monkeypatch.setattr(structure, "milp", noted)
    solve_structure(chain([1, 1, 4, 4, 3, 3]), max_stages=3, effort=Effort(num_nodes=7, time_limit_s=60))
    assert [(options["node_limit"], options["time_limit"]) for options in asked] == [(7, 60)]


def test_a_device_is_not_divided_beside_collectives() -> None:
    case, measured = chain([1, 1, 4, 4, 3, 3]), interference([(0.5, 0.5, 0.8)])
    assert divisions(case, measured)
    first = replace(case.tasks[0], group=replace(case.tasks[0].group, resource=Resource.NETWORK))
    assert divisions(replace(case, tasks=(first, *case.tasks[1:])), measured) == []


def test_the_earliest_task_starts_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in its period the solver puts it."""
    found = Solution(values=np.array([1.0, 0.75, 1.25]), bound=1.0)
    monkeypatch.setattr(Program, "maximise", lambda *_, **__: found)
    case = problem([("qkv_proj", 0, 1.0), ("decode_attention", 0, 1.0)], [(0, 1, 0)])
    schedule = solve_structure(case, max_stages=3, effort=EFFORT)
    assert schedule is not None and schedule.starts == (0.0, 0.5)


def test_one_nano_batch_cannot_overlap() -> None:
    case = problem(
        [("qkv_proj", 0, 1.0), ("decode_attention", 0, 4.0), ("down_proj", 0, 3.0)], [(0, 1, 0), (1, 2, 0), (2, 0, 1)]
    )
    found = solve_structure(case, max_stages=3, effort=EFFORT)
    assert found is not None and found.period_s == pytest.approx(8.0)


def test_too_little_time_gives_nothing_rather_than_something_wrong() -> None:
    found = solve_structure(chain([1, 1, 4, 4, 3, 3]), max_stages=3, effort=Effort(num_nodes=0, time_limit_s=1e-9))
    assert found is None or found.period_s >= 8.0 - 1e-6


def test_separation_says_who_comes_when() -> None:
    schedule = Schedule(starts=(0.0, 0.5, 1.25), lengths=(0.25, 0.5, 0.25), period_s=1.0, least_period_s=1.0)
    assert schedule.separation(0, 1) == 0 and schedule.separation(1, 0) == 1
    # The third one is a period late: it lies right after the first.
    assert schedule.separation(0, 2) == -1
    assert schedule.separation(1, 2) == 0
    late = Schedule(starts=(0.0, 0.1), lengths=(0.25, 0.5), period_s=1.0, least_period_s=1.0)
    assert late.separation(0, 1) is None
    assert schedule.separation(0, 1, margin=0.3) is None


def interference(
    curve: Sequence[tuple[float, float, float]], mechanism: Mechanism = Mechanism.PARTITION
) -> Interference:
    """Share of the product, its performance, that of the attention."""
    pairs = tuple(
        PairPoint(
            first="down_proj",
            second="decode_attention",
            first_tokens=1,
            second_tokens=1,
            mechanism=mechanism,
            share=share,
            first_performance=first,
            second_performance=second,
        )
        for share, first, second in curve
    )
    profile = Profile(model="m", config=dict(PRESETS["llama-3-8b"]), setup=SETUP, pairs=pairs)
    return Interference(profile, GRAPH)


def best_on_a_grid(case: Problem, curve: Interference, largest: int) -> int:
    """The least whole period over all shares and all whole starts, by looking at every one."""
    mechanism = Mechanism.PARTITION
    options = [
        [
            (share, round(task.cost.time_s / curve.performance(mechanism, task.group.operations[0], share, 1)))
            for share in curve.shares(mechanism, task.group.resource)
        ]
        for task in case.tasks
    ]
    for period in range(1, largest):
        starts = np.array(list(itertools.product(range(3 * period), repeat=len(case.tasks) - 1)))
        starts = np.hstack([np.zeros((len(starts), 1), int), starts])
        if any(fits(case, picks, starts, period) for picks in itertools.product(*options)):
            return period
    return largest


def fits(case: Problem, picks: Sequence[tuple[float, int]], starts: np.ndarray, period: int) -> bool:
    good = np.ones(len(starts), bool)
    for edge in case.edges:
        good &= starts[:, edge.second] + edge.distance * period >= starts[:, edge.first] + picks[edge.first][1]
    use = {resource: np.zeros((len(starts), period)) for resource in (Resource.COMPUTE, Resource.MEMORY)}
    shares = np.zeros((len(starts), period))
    for place, (share, length) in enumerate(picks):
        if length > period:
            return False
        for step in range(length):
            at = (starts[:, place] + step) % period
            use[case.tasks[place].group.resource][np.arange(len(starts)), at] += 1
            shares[np.arange(len(starts)), at] += share
    good &= (shares <= 1 + 1e-9).all(axis=1)
    for used in use.values():
        good &= (used <= 1).all(axis=1)
    return bool(good.any())


@pytest.mark.parametrize(
    ("times", "curve"),
    [
        ((2, 2, 2, 2), [(0.5, 0.5, 1.0)]),
        ((3, 1, 2, 2), [(0.5, 1.0, 0.5)]),
        ((2, 2, 2, 2), [(0.5, 0.5, 0.5)]),
        ((4, 2, 1, 1), [(0.75, 1.0, 0.5)]),
    ],
)
def test_shares_are_the_best_of_all(times: tuple[float, ...], curve: list[tuple[float, float, float]]) -> None:
    """Two nano-batches of a product and an attention; lengths on all shares are whole numbers."""
    case = problem(
        [
            ("down_proj", 0, times[0]),
            ("down_proj", 1, times[1]),
            ("decode_attention", 0, times[2]),
            ("decode_attention", 1, times[3]),
        ],
        [(0, 2, 0), (1, 3, 0), (2, 0, 1), (3, 1, 1)],
    )
    curves = interference(curve)
    order = solve_structure(case, max_stages=3, effort=EFFORT)
    assert order is not None
    found = allocate(case, order, curves, SETUP, mechanism=Mechanism.PARTITION, max_stages=3, effort=EFFORT, margin=1.0)
    assert found is not None
    best = best_on_a_grid(case, curves, largest=round(sum(times)) + 1)
    assert found.schedule.period_s <= best + 1e-6
    assert found.schedule.period_s > best - 1, "a period of fractions may be shorter, but not by a whole"


def test_a_solver_that_was_stopped_before_it_found_more_than_nothing_found_no_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = chain([1, 1, 1, 1, 1, 1])
    order = solve_structure(case, max_stages=3, effort=EFFORT)
    assert order is not None
    nothing = Solution(values=np.zeros(1000), bound=2.0)
    monkeypatch.setattr(Program, "maximise", lambda *_args, **_kwargs: nothing)
    curves = interference([(0.5, 1.0, 1.0)])
    assert allocate(case, order, curves, SETUP, mechanism=Mechanism.PARTITION, max_stages=3, effort=EFFORT) is None


def test_power_limits_the_period() -> None:
    """100 J of dynamic energy a layer at 10 W beyond the static power take 10 s, however well they overlap."""
    case = chain([1, 1, 1, 1, 1, 1])
    tasks = tuple(
        Task(group=task.group, tokens=task.tokens, cost=Cost(time_s=1.0, energy_j=100 / 6 + 5.0)) for task in case.tasks
    )
    hungry = Problem(graph=GRAPH, shape=case.shape, tasks=tasks, edges=case.edges)
    order = solve_structure(hungry, max_stages=3, effort=EFFORT)
    assert order is not None
    limits = Setup(gpu="test", memory_bytes=1e9, power_limit_w=15.0, static_power_w=5.0)
    curves = interference([(0.5, 1.0, 1.0)])
    found = allocate(hungry, order, curves, limits, mechanism=Mechanism.PARTITION, max_stages=3, effort=EFFORT)
    assert found is not None
    # Alone an operation cannot have drawn more than the limit: 10 W x 1 s each.
    assert found.schedule.period_s == pytest.approx(6.0)


def test_prefill_attention_goes_where_it_evens_out_the_parts() -> None:
    """On halves at half speed products take 8 and attentions 4, or 6 and 6; on streams there is nothing to choose."""
    case = problem([("qkv_proj", 0, 3.0), ("prefill_attention", 0, 1.0), ("decode_attention", 0, 2.0)], [])
    found = divisions(case, interference([(0.5, 0.5, 0.5)]))
    assert [each.name for each in found] == ["partition 0.50, attentions together", "partition 0.50"]
    assert [each.least_period_s for each in found] == pytest.approx([6.0, 8.0])
    assert found[0].shares == (0.5, 0.5, 0.5) and found[1].problem.tasks[1].group.resource is Resource.COMPUTE
    without = problem([("qkv_proj", 0, 3.0), ("decode_attention", 0, 2.0)], [])
    assert [each.name for each in divisions(without, interference([(0.5, 0.5, 0.5)]))] == ["partition 0.50"]


def test_who_is_left_alone_beside_another_has_the_device_again() -> None:
    """At 0.6 and 0.6 an attention of 3 takes 5, in which 3 of 12 are done; on parts of the device 12 take 20."""
    case = problem([("qkv_proj", 0, 12.0), ("decode_attention", 0, 3.0)], [])
    for mechanism, least_s in ((Mechanism.PARTITION, 20.0), (Mechanism.BESIDE, 5.0 + 9.0)):
        (found,) = divisions(case, interference([(0.5, 0.6, 0.6)], mechanism))
        assert found.least_period_s == pytest.approx(least_s)
    case = problem([("qkv_proj", 0, 3.0), ("decode_attention", 0, 12.0)], [])
    (found,) = divisions(case, interference([(0.5, 0.6, 0.6)], Mechanism.BESIDE))
    assert found.least_period_s == pytest.approx(5.0 + 9.0)
