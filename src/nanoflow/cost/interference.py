"""R -> P: what an operation keeps of its speed on a share of the device while another one runs on the rest.

The curves are measured pairs of a profile, one a mechanism and operation, and one a mechanism and resource for
operations that were not in a pair (the paper's section 4.1.1 finds the same curve for all shapes within 5 %). Between
measured shares they are linear; P(0) = 0 and P(1) = 1.

A pair at the power limit runs at lower clocks than each side alone on its share, and both lose by them alike. That part
of the loss is taken out here, for it holds of a whole layer, and only as far as the layer's energy asks for it
(`power.py`). It is the smaller loss of the two, where both sides were also measured alone on their share.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean

from nanoflow.cost.table import CostTable, PairPoint, Profile
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import Operation, OpKind, Resource
from nanoflow.plan.plan import Mechanism

Curve = tuple[tuple[float, float], ...]
# Small operations between products: they run in the products' lane, whatever bounds them.
_ROW_WISE = frozenset({OpKind.RMS_NORM, OpKind.ROPE_APPEND, OpKind.SWIGLU, OpKind.EMBED, OpKind.GATHER_ROWS})


def lane_of(op: Operation) -> Resource:
    """The resource in whose lane an operation runs: its own, but row-wise ones stay with the products around them."""
    return Resource.COMPUTE if op.kind in _ROW_WISE else op.resource


class Interference:
    """The measured curves of a profile."""

    def __init__(self, profile: Profile, graph: OpGraph) -> None:
        self._resource = {op.name: lane_of(op) for _, section in graph.sections() for op in section}
        alone = _alone_on_shares(profile, graph)
        by_operation: dict[tuple[Mechanism, str], list[tuple[float, float]]] = defaultdict(list)
        by_resource: dict[tuple[Mechanism, Resource], list[tuple[float, float]]] = defaultdict(list)
        ratios: dict[Mechanism, list[tuple[float, float]]] = defaultdict(list)
        for pair in profile.pairs:
            for name, share, performance in _without_throttling(_sides(pair), pair, alone):
                by_operation[pair.mechanism, name].append((share, performance))
                if name in self._resource:
                    by_resource[pair.mechanism, self._resource[name]].append((share, performance))
            if pair.energy_ratio is not None:
                ratios[pair.mechanism].append((pair.share, pair.energy_ratio))
        self._by_operation = {key: _curve([*found, (0.0, 0.0), (1.0, 1.0)]) for key, found in by_operation.items()}
        self._by_resource = {key: _curve([*found, (0.0, 0.0), (1.0, 1.0)]) for key, found in by_resource.items()}
        self._ratios = {mechanism: _curve(found) for mechanism, found in ratios.items()}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Mechanisms that a pair was measured with."""
        return tuple(dict.fromkeys(mechanism for mechanism, _ in self._by_resource))

    def shares(self, mechanism: Mechanism, resource: Resource) -> tuple[float, ...]:
        """Shares that operations of a resource were measured on, increasing, the whole device last."""
        curve = self._by_resource.get((mechanism, resource), ((1.0, 1.0),))
        return tuple(share for share, performance in curve if performance > 0)

    def performance(self, mechanism: Mechanism, op: Operation, share: float) -> float:
        """P of an operation on a share; the share itself where nothing was measured."""
        if share >= 1.0 or mechanism is Mechanism.WHOLE:
            return 1.0
        curve = self._by_operation.get((mechanism, op.name)) or self._by_resource.get((mechanism, lane_of(op)))
        return share if curve is None else max(_at(curve, share), 1e-3)

    def energy_ratio(self, mechanism: Mechanism, first_share: float) -> float:
        """Energy of a pair / of the same work one after the other; 1 where nothing was measured."""
        curve = self._ratios.get(mechanism)
        return 1.0 if curve is None else _at(curve, first_share)


# Operation, share, performance.
_Side = tuple[str, float, float]


def _sides(pair: PairPoint) -> tuple[_Side, _Side]:
    """Operation, share and performance of both, shares rounded so that equal ones meet."""
    return (
        (pair.first, round(pair.share, 4), pair.first_performance),
        (pair.second, round(1.0 - pair.share, 4), pair.second_performance),
    )


# Time on the whole device / time alone on a share, by operation, tokens and share.
_Alone = dict[tuple[str, int, float], float]


def _alone_on_shares(profile: Profile, graph: OpGraph) -> _Alone:
    parts = [point for point in profile.points if point.mechanism is Mechanism.PARTITION]
    if not parts:
        return {}
    table = CostTable(profile, graph)
    found = {}
    for part in parts:
        whole_s = table.cost(part.operation, part.num_tokens, part.context).time_s
        found[part.operation, part.num_tokens, round(part.share, 4)] = whole_s / part.time_s
    return found


def _without_throttling(sides: Sequence[_Side], pair: PairPoint, alone: _Alone) -> Iterator[_Side]:
    """Both sides as if clocks were those of each alone on its share."""
    sizes = (pair.first_tokens, pair.second_tokens)
    kept = [
        performance / alone[name, size, share]
        for (name, share, performance), size in zip(sides, sizes, strict=True)
        if (name, size, share) in alone
    ]
    throttling = min(max(kept), 1.0) if len(kept) == len(sides) else 1.0
    return ((name, share, performance / throttling) for name, share, performance in sides)


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
