"""Stage 2: the order is fixed; on which share of the device does each task run? Another mixed-integer program.

On share r a task takes d_i / P(r) (`profile/interference.py`), and whatever runs at the same time shares one device.
With u = 1 / H and w_ir = u if task i has share r, else 0, the program stays linear:

    maximise u
    sum_r w_ir = u,  w_ir <= U y_ir,  sum_r y_ir = 1          one share a task; it lasts sum_r d_i / P(r) w_ir
    dependencies and order as in stage 1, with these lengths
    o_ij = 1, or i and j do not overlap                        for tasks on different resources
    R_i + R_j <= 1 where o_ij = 1, R_i + R_j + R_k <= 1 where all three pairs overlap
    sum_ir E_i(r) w_ir <= power limit - static power           dynamic energy of a period, in a period

The last one is power as the fourth resource: makespan x (limit - static) >= dynamic energy, with the measured energy of
pairs. Which mechanism gives the shares is the caller's to try.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nanoflow.graph.operation import Resource
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.interference import Interference
from nanoflow.profile.power import dynamic_energy_j, dynamic_power_w
from nanoflow.profile.table import Setup
from nanoflow.search.problem import Problem, Task
from nanoflow.search.structure import Effort, Program, Row, Schedule, Solution, add_dependencies, shifted


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A share that a task may have: how long it then lasts, and its dynamic energy on one GPU (None if unknown)."""

    share: float
    time_s: float
    dynamic_j: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Schedule and share of every task; `schedule.starts` are new ones, for lengths have changed."""

    mechanism: Mechanism
    schedule: Schedule
    shares: tuple[float, ...]


def allocate(
    problem: Problem,
    order: Schedule,
    interference: Interference,
    setup: Setup,
    *,
    mechanism: Mechanism,
    max_stages: int,
    effort: Effort,
    margin: float = 0.0,
    most_s: float | None = None,
) -> Allocation | None:
    """Shares with the shortest period for the order of a schedule.

    Args:
        problem, order: The tasks, and their schedule of stage 1.
        interference, setup: What shares and power cost.
        mechanism: How lanes share the device.
        max_stages: Periods that a layer may last at most.
        effort: When to stop.
        margin: Tasks that are nearer to each other than this, in periods, may come to overlap.
        most_s: The period must be at most so long. A solver proves much sooner that there is no such period than it
            finds the best one.

    Returns:
        None if there are no such shares, or none were found in time.
    """
    program = Program()
    ample_rate = _ample_rate(problem, order)
    least_rate = 0.0 if most_s is None else problem.sequential_s / most_s
    if least_rate > ample_rate:
        return None
    rate = program.variable(ample_rate, lower=least_rate)
    starts = [program.variable(max_stages) for _ in problem.tasks]
    # 1. One share a task; lengths and shares as rows.
    choices = [choices_of(task, interference, setup, mechanism) for task in problem.tasks]
    picks = [_pick(program, rate, options, ample_rate) for options in choices]
    lengths = [_length(problem, pick, options) for pick, options in zip(picks, choices, strict=True)]
    add_dependencies(program, problem, starts, lengths)
    # 2. The order of stage 1 on each resource.
    for i, j in problem.same_lane():
        _keep_order(program, starts, lengths, (i, j), order.separation(i, j) or 0)
    # 3. What overlaps shares the device.
    separations = {(i, j): order.separation(i, j, margin) for i, j in problem.other_lane()}
    variables = _Variables(starts=starts, lengths=lengths, picks=picks, choices=choices)
    _share_where_overlapping(program, variables, separations, max_stages)
    # 4. Of the device's time no more can be shared than there is; this follows from 3, but tightens the relaxation.
    program.at_least(_device_time(problem, picks, choices), -1.0)
    # 5. Power.
    _limit_power(program, problem, picks, choices, setup)
    solution = program.maximise(rate, time_limit_s=effort.time_limit_s, num_nodes=effort.num_nodes)
    # A rate of 0 satisfies all rows, and a solver that is stopped early may have found nothing better.
    if solution is None or solution.values[rate] <= 0:
        return None
    return _allocation(problem, solution, float(solution.values[rate]), variables, mechanism)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variables:
    """Of all tasks, in their order: starts, lengths, and what each chooses among."""

    starts: list[int]
    lengths: list[Row]
    picks: list[_Pick]
    choices: list[tuple[Choice, ...]]


def _allocation(
    problem: Problem, solution: Solution, rate: float, variables: _Variables, mechanism: Mechanism
) -> Allocation:
    """What a solution with this rate, in layers per sequential layer, says of the tasks."""
    chosen = [max(pick.chosen, key=lambda place: solution.values[pick.chosen[place]]) for pick in variables.picks]
    return Allocation(
        mechanism=mechanism,
        schedule=Schedule(
            starts=shifted([float(solution.values[start]) for start in variables.starts]),
            lengths=tuple(_value(length, solution) for length in variables.lengths),
            period_s=problem.sequential_s / rate,
            least_period_s=problem.sequential_s / solution.bound,
        ),
        shares=tuple(options[place].share for options, place in zip(variables.choices, chosen, strict=True)),
    )


def _share_where_overlapping(
    program: Program, variables: _Variables, separations: Mapping[tuple[int, int], int | None], max_stages: int
) -> None:
    """Tasks on different resources: those with a separation keep it, the others share the device if they overlap."""
    starts, lengths = variables.starts, variables.lengths
    overlaps = {}
    for pair, periods in separations.items():
        if periods is None:
            overlaps[pair] = _overlap(program, starts, lengths, pair, max_stages)
        else:
            _keep_order(program, starts, lengths, pair, periods)

    def share(places: tuple[int, ...], among: list[int]) -> None:
        picks = [variables.picks[place] for place in places]
        _share_device(program, picks, [variables.choices[place] for place in places], among)

    for pair, overlap in overlaps.items():
        share(pair, [overlap])
    for trio in _trios(overlaps):
        share(trio, [overlaps[pair] for pair in itertools.combinations(trio, 2)])


def least_period_s(
    problem: Problem, order: Schedule, interference: Interference, setup: Setup, mechanism: Mechanism
) -> float:
    """What no shares can undercut, without a program: the order's period, the device's time, the energy."""
    choices = [choices_of(task, interference, setup, mechanism) for task in problem.tasks]
    device_s = sum(min(choice.share * choice.time_s for choice in options) for options in choices)
    energies = [min((choice.dynamic_j or 0.0) for choice in options) for options in choices]
    limit_w = dynamic_power_w(setup)
    return max(order.period_s, device_s, 0.0 if limit_w is None else sum(energies) / limit_w)


def _value(row: Row, solution: Solution) -> float:
    return float(sum(factor * solution.values[variable] for variable, factor in row.items()))


def choices_of(task: Task, interference: Interference, setup: Setup, mechanism: Mechanism) -> tuple[Choice, ...]:
    """The shares that a task may have under a mechanism, the whole device among them."""
    cost = task.cost
    dynamic_j = dynamic_energy_j(cost, setup)
    found = []
    for share in interference.shares(mechanism, task.group.resource):
        main = next(op for op in task.group.operations if op.name == task.group.name)
        first_share = share if task.group.resource is Resource.COMPUTE else 1.0 - share
        num_tokens = task.tokens.num_tokens
        ratio = 1.0 if share >= 1.0 else interference.energy_ratio(mechanism, first_share, num_tokens)
        found.append(
            Choice(
                share=share,
                time_s=cost.time_s / interference.performance(mechanism, main, share, num_tokens),
                dynamic_j=None if dynamic_j is None else dynamic_j * ratio,
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pick:
    """Variables of one task: y and w of each choice."""

    chosen: Mapping[int, int]
    rates: Mapping[int, int]


def _pick(program: Program, rate: int, options: tuple[Choice, ...], largest_rate: float) -> _Pick:
    chosen = {place: program.variable(1.0, is_integer=True) for place in range(len(options))}
    rates = {place: program.variable(largest_rate) for place in range(len(options))}
    program.equals(dict.fromkeys(chosen.values(), 1.0), 1.0)
    program.equals({**dict.fromkeys(rates.values(), 1.0), rate: -1.0}, 0.0)
    for place, variable in rates.items():
        program.at_least({chosen[place]: largest_rate, variable: -1.0}, 0.0)
    return _Pick(chosen=chosen, rates=rates)


def _length(problem: Problem, pick: _Pick, options: tuple[Choice, ...]) -> Row:
    return {pick.rates[place]: option.time_s / problem.sequential_s for place, option in enumerate(options)}


def _after(late: int, early: int, length: Row) -> Row:
    """late - early - length."""
    return {late: 1.0, early: -1.0, **{variable: -factor for variable, factor in length.items()}}


def _keep_order(program: Program, starts: list[int], lengths: list[Row], pair: tuple[int, int], periods: int) -> None:
    """The two do not overlap, and j stays where it was in i's round."""
    i, j = pair
    program.at_least(_after(starts[j], starts[i], lengths[i]), -float(periods))
    program.at_least(_after(starts[i], starts[j], lengths[j]), periods - 1.0)


def _overlap(program: Program, starts: list[int], lengths: list[Row], pair: tuple[int, int], max_stages: int) -> int:
    """A variable that must be 1 if the two overlap."""
    i, j = pair
    overlap = program.variable(1.0, is_integer=True)
    periods = program.variable(max_stages, lower=-max_stages, is_integer=True)
    ample = 2.0 * max_stages + 2.0
    program.at_least({**_after(starts[j], starts[i], lengths[i]), periods: 1.0, overlap: ample}, 0.0)
    program.at_least({**_after(starts[i], starts[j], lengths[j]), periods: -1.0, overlap: ample}, -1.0)
    return overlap


def _share_device(program: Program, picks: list[_Pick], options: list[tuple[Choice, ...]], overlaps: list[int]) -> None:
    """Shares sum to at most 1 where every pair overlaps."""
    row: Row = {
        pick.chosen[place]: -choice.share
        for pick, choices in zip(picks, options, strict=True)
        for place, choice in enumerate(choices)
    }
    # Without an overlap the shares may sum to as many as there are tasks.
    slack = float(len(picks) - 1)
    for overlap in overlaps:
        row[overlap] = -slack
    program.at_least(row, -1.0 - slack * len(overlaps))


def _trios(overlaps: Mapping[tuple[int, int], int]) -> Iterator[tuple[int, int, int]]:
    """Tasks on three different resources, in order of their places."""
    places = sorted({place for pair in overlaps for place in pair})
    for trio in itertools.combinations(places, 3):
        if all(pair in overlaps for pair in itertools.combinations(trio, 2)):
            yield trio


def _limit_power(
    program: Program, problem: Problem, picks: list[_Pick], choices: list[tuple[Choice, ...]], setup: Setup
) -> None:
    """The dynamic energy of a period fits into what the limit leaves beside static power; nothing if unknown."""
    limit_w = dynamic_power_w(setup)
    if limit_w is None:
        return
    row: Row = {}
    for pick, options in zip(picks, choices, strict=True):
        for place, choice in enumerate(options):
            if choice.dynamic_j is None:
                return
            row[pick.rates[place]] = -choice.dynamic_j / problem.sequential_s
    program.at_least(row, -limit_w)


def _device_time(problem: Problem, picks: list[_Pick], choices: list[tuple[Choice, ...]]) -> Row:
    """Minus the sum of share x length over all tasks, in periods."""
    return {
        pick.rates[place]: -choice.share * choice.time_s / problem.sequential_s
        for pick, options in zip(picks, choices, strict=True)
        for place, choice in enumerate(options)
    }


def _ample_rate(problem: Problem, order: Schedule) -> float:
    """No share makes anything faster than stage 1 supposed."""
    return problem.sequential_s / min(order.least_period_s, order.period_s) + 1e-6
