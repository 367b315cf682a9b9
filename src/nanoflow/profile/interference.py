"""R -> P: the part of its speed that an operation keeps on a share of the device, beside another one or alone.

The curves come from the measured pairs of a profile. There is one for each mechanism and operation, and one for each
mechanism and resource, for operations that were in no pair. (The paper's section 4.1.1 finds the same curve for all
shapes within 5 %.) Between measured shares a curve is linear; P(0) = 0 and P(1) = 1.

- *Sizes.* Products of few tokens have too few tiles for one curve to hold. So each measured number of tokens has its
  own, and between two of them the worse counts (`at_size`).
- *Parts of the device.* On fewer multiprocessors a product's tiles come in other waves, which differ from size to size.
  So P is multiplied by what the operation keeps alone on that share at its own size, and divided by what it keeps there
  at the pair's size. While nothing runs beside it, it keeps what it keeps alone.
- *Power.* Both sides of a pair run at the clock that the power limit leaves to the pair. What they gain or lose by it
  is contained in P.

Products that carry attention are looked up in `carry.py`.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import GATED, Operation, OpKind, Resource
from nanoflow.plan.mechanisms import Measured, Mechanism
from nanoflow.profile.carry import CarryTable, at_size, measured_size
from nanoflow.profile.table import CostTable, PairPoint, Profile

Curve = tuple[tuple[float, float], ...]
# By size: tokens of an operation alone; of a pair, those of its first operation, which stand for a nano-batch's.
Curves = Mapping[int, Curve]
# P(0) = 0 and P(1) = 1. Shares are compared after rounding.
_ENDS = ((0.0, 0.0), (1.0, 1.0))
_DIGITS = 4
_LEAST = 1e-3
# Small operations between products: they run in the products' lane, whatever bounds them.
_ROW_WISE = frozenset(
    (
        *(OpKind.RMS_NORM, OpKind.RMS_NORM_ADD, OpKind.ROPE_APPEND, *GATED, OpKind.EMBED, OpKind.GATHER_ROWS),
        *(OpKind.ROUTER, OpKind.EXPERT_ORDER, OpKind.COMBINE, OpKind.SHARED_GATE),
        *(OpKind.RMS_NORM_FP8, OpKind.QUANTISE_FP8),
    )
)


def lane_of(op: Operation) -> Resource:
    """The resource in whose lane an operation runs: its own, but row-wise ones stay with the products around them."""
    return Resource.COMPUTE if op.kind in _ROW_WISE else op.resource


class Interference:
    """The measured curves of a profile.

    Attributes:
        carry: What products that carry decode attention keep, and that attention.
    """

    def __init__(self, profile: Profile, graph: OpGraph) -> None:
        self._resource = {op.key: lane_of(op) for op in graph.operations()}
        self._alone = _alone_on_shares(profile, graph)
        self.carry = CarryTable(profile, graph)
        self._known: dict[tuple[Mechanism, str, float, int], float] = {}
        self._pair_tokens: dict[tuple[Mechanism, str, int], int] = {}
        by_operation: dict[tuple[Mechanism, str], _Found] = defaultdict(lambda: defaultdict(list))
        by_resource: dict[tuple[Mechanism, Resource], _Found] = defaultdict(lambda: defaultdict(list))
        ratios: dict[Mechanism, _Found] = defaultdict(lambda: defaultdict(list))
        for pair in profile.pairs:
            if pair.mechanism.traits.measured is not Measured.PAIRS:
                continue
            for side in _sides(pair):
                self._pair_tokens[pair.mechanism, side.operation, pair.first_tokens] = side.num_tokens
                point = (side.share, side.performance)
                by_operation[pair.mechanism, side.operation][pair.first_tokens].append(point)
                if side.operation in self._resource:
                    by_resource[pair.mechanism, self._resource[side.operation]][pair.first_tokens].append(point)
            if pair.energy_ratio is not None:
                ratios[pair.mechanism][pair.first_tokens].append((pair.share, pair.energy_ratio))
        self._by_operation = {key: _curves(found, _ENDS) for key, found in by_operation.items()}
        self._by_resource = {key: _curves(found, _ENDS) for key, found in by_resource.items()}
        self._ratios = {mechanism: _curves(found) for mechanism, found in ratios.items()}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Mechanisms that a pair on two lanes was measured with."""
        return tuple(dict.fromkeys(mechanism for mechanism, _ in self._by_resource))

    def shares(self, mechanism: Mechanism, resource: Resource) -> tuple[float, ...]:
        """Shares that operations of a resource were measured on, increasing, the whole device last."""
        curves = self._by_resource.get((mechanism, resource), {})
        found = {share for curve in curves.values() for share, performance in curve if performance > 0}
        return tuple(sorted(found | {1.0}))

    def performance(self, mechanism: Mechanism, op: Operation, share: float, num_tokens: int) -> float:
        """P of an operation on a share beside another one; the share itself where nothing was measured."""
        if share >= 1.0 or mechanism.traits.measured is Measured.NOTHING:
            return 1.0
        key = (mechanism, op.key, share, num_tokens)
        if key not in self._known:
            self._known[key] = self._performance(mechanism, op, share, num_tokens)
        return self._known[key]

    def _performance(self, mechanism: Mechanism, op: Operation, share: float, num_tokens: int) -> float:
        curves = self._by_operation.get((mechanism, op.key)) or self._by_resource.get((mechanism, lane_of(op)))
        if curves is None:
            return share
        found = at_size(curves, num_tokens, lambda size: self._beside(mechanism, op, share, num_tokens, size, curves))
        return max(found, _LEAST)

    def _beside(
        self, mechanism: Mechanism, op: Operation, share: float, num_tokens: int, size: int, curves: Curves
    ) -> float:
        """P by the curve of the pairs of one size."""
        curve = curves[size]
        here = self._kept_alone(mechanism, op.key, share, num_tokens)
        if here is None:
            return _at(curve, share)
        # Below the smallest share of a pair, the loss to the other operation is taken from that pair.
        of_pair = max(share, min(share for share, kept in curve if kept > 0))
        pair_tokens = self._pair_tokens.get((mechanism, op.key, size), num_tokens)
        there = self._kept_alone(mechanism, op.key, of_pair, pair_tokens)
        return here * _at(curve, of_pair) / (there or 1.0)

    def performance_alone(self, mechanism: Mechanism, op: Operation, share: float, num_tokens: int) -> float:
        """P of an operation on a share while nothing runs beside it; as beside another where that is all there is."""
        kept = self._kept_alone(mechanism, op.key, share, num_tokens)
        return self.performance(mechanism, op, share, num_tokens) if kept is None else max(kept, _LEAST)

    def _kept_alone(self, mechanism: Mechanism, operation: str, share: float, num_tokens: int) -> float | None:
        """P alone on a share, at the next larger measured size or the largest; None where it was not measured."""
        curves = self._alone.get(operation)
        if curves is None or not mechanism.traits.keeps_share:
            return None
        return _at(curves[measured_size(curves, num_tokens)], share)

    def energy_ratio(self, mechanism: Mechanism, first_share: float, num_tokens: int) -> float:
        """Energy of a pair / of the same work one after the other; 1 where nothing was measured."""
        curves = self._ratios.get(mechanism)
        return 1.0 if curves is None else -at_size(curves, num_tokens, lambda size: -_at(curves[size], first_share))


# (share, value) by tokens.
_Found = dict[int, list[tuple[float, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One operation of a pair."""

    operation: str
    num_tokens: int
    share: float
    performance: float


def _sides(pair: PairPoint) -> tuple[_Side, _Side]:
    """Both, shares rounded so that equal ones meet."""
    return (
        _Side(
            operation=pair.first,
            num_tokens=pair.first_tokens,
            share=round(pair.share, _DIGITS),
            performance=pair.first_performance,
        ),
        _Side(
            operation=pair.second,
            num_tokens=pair.second_tokens,
            share=round(1.0 - pair.share, _DIGITS),
            performance=pair.second_performance,
        ),
    )


def _alone_on_shares(profile: Profile, graph: OpGraph) -> Mapping[str, Curves]:
    """Time on the whole device / time alone on a share, by operation and size."""
    parts = [point for point in profile.points if point.mechanism.traits.keeps_share]
    if not parts:
        return {}
    table = CostTable(profile, graph)
    found: dict[str, _Found] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        whole_s = table.cost(part.operation, part.num_tokens, part.context).time_s
        found[part.operation][part.num_tokens].append((round(part.share, _DIGITS), whole_s / part.time_s))
    return {operation: _curves(by_size, _ENDS) for operation, by_size in found.items()}


def _curves(by_size: _Found, ends: Curve = ()) -> Curves:
    return {size: _curve([*points, *ends]) for size, points in by_size.items()}


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Points by share, those of one share as their mean."""
    found: dict[float, list[float]] = defaultdict(list)
    for share, value in points:
        found[share].append(value)
    return tuple((share, fmean(found[share])) for share in sorted(found))


def _at(curve: Curve, share: float) -> float:
    """Linear between points, and constant beyond the first and the last."""
    shares = [point[0] for point in curve]
    place = bisect.bisect_left(shares, share)
    if place == 0 or len(curve) == 1:
        return curve[0][1]
    if place == len(curve):
        return curve[-1][1]
    (low, below), (high, above) = curve[place - 1], curve[place]
    return below + (above - below) * (share - low) / (high - low)
