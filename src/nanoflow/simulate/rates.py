"""How fast nano-operations run that are on the device at the same time.

What is measured of a lane's mechanism decides: pairs of operations (`profile/interference.py`), or products together
with the attention that they carry (`profile/carry.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation, OpKind, Resource
from nanoflow.plan.mechanisms import Measured
from nanoflow.plan.plan import Lane
from nanoflow.profile.carry import STANDS_STILL, filled
from nanoflow.profile.interference import Interference, lane_of
from nanoflow.profile.table import Cost

# Which operation of a measured pair is the first.
_PRECEDENCE = {Resource.COMPUTE: 0, Resource.MEMORY: 1, Resource.NETWORK: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A nano-operation of a plan on a batch.

    Attributes:
        op, lane, tokens: What runs where, on which tokens.
        cost: Alone on the whole device, with the gap that a launch takes.
        dynamic_j: Energy beyond the static power; None if unknown.
        context: Keys that each token of an attention sees; 0 for other operations.
        carries: Whether it is a product that carries decode attention by the plan's order.
    """

    op: Operation
    lane: Lane
    tokens: TokenRange
    cost: Cost
    dynamic_j: float | None
    context: float
    carries: bool


def rates_of(running: Sequence[Item], interference: Interference) -> tuple[list[float], float]:
    """How fast each item runs, as a part of its speed alone, and the dynamic power of all of them, in watts."""
    if any(item.lane.mechanism.traits.measured is Measured.CARRIED for item in running):
        rates, energy_ratio = _rates_carrying(running, interference)
    elif len(running) == 1:
        rates, energy_ratio = [_rate_alone(running[0], interference)], 1.0
    else:
        shares = sum(item.lane.share for item in running)
        rates = [
            interference.performance(item.lane.mechanism, item.op, item.lane.share, item.tokens.num_tokens)
            / max(shares, 1.0)
            for item in running
        ]
        energy_ratio = _energy_ratio(running, interference)
    dynamic_w = sum(
        rate * (item.dynamic_j or 0.0) / item.cost.time_s for item, rate in zip(running, rates, strict=True)
    )
    return rates, dynamic_w * energy_ratio


def _rates_carrying(running: Sequence[Item], interference: Interference) -> tuple[list[float], float]:
    """Speeds where one lane holds decode attention and the other everything else, and the pair's energy ratio.

    Attention advances only while a product that carries it runs; beside anything else it stands still.
    """
    host = next((item for item in running if item.op.kind is not OpKind.DECODE_ATTENTION), None)
    if host is None:
        return [1.0], 1.0
    found, table = STANDS_STILL, interference.carry
    if host.carries and len(running) > 1:
        found = table.full(host.op, host.lane.share, host.tokens.num_tokens)
    elif host.carries:
        found = table.empty(host.op, host.tokens.num_tokens)
    return [
        found.product if item is host else found.attention * filled(item.context) for item in running
    ], found.energy_ratio


def _rate_alone(item: Item, interference: Interference) -> float:
    if not item.lane.mechanism.traits.keeps_share:
        return 1.0
    return interference.performance_alone(item.lane.mechanism, item.op, item.lane.share, item.tokens.num_tokens)


def _energy_ratio(running: Sequence[Item], interference: Interference) -> float:
    """Energy of the pair / of the same work one after the other, looked up by the pair's first operation.

    In measured pairs that is the one bound by compute, or by memory beside a collective.
    """
    first = min(running, key=lambda item: (_PRECEDENCE[lane_of(item.op)], -item.lane.share))
    return interference.energy_ratio(first.lane.mechanism, first.lane.share, first.tokens.num_tokens)
