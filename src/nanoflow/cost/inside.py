"""How fast a product and the decode attention inside it are, from measured pairs; a part of `interference.py`.

A product carries attention at a fixed rate, so many k-steps to a block of keys, which its lane's share stands for. The
rate fixes how much attention there is beside how much product: what is left of either runs alone. Nothing but a
product carries, so attention stands still beside anything else in the products' lane.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from nanoflow.cost.table import PairPoint
from nanoflow.graph.operation import LinearDims, Operation
from nanoflow.plan.plan import Mechanism


@dataclass(frozen=True, slots=True, kw_only=True)
class InsideRates:
    """What both sides keep of their speed alone, and the energy of both of that alone, one after the other."""

    product: float
    attention: float
    energy_ratio: float = 1.0


_STANDS_STILL = InsideRates(product=1.0, attention=0.0)


class Inside:
    """The pairs of a profile whose mechanism is INSIDE."""

    def __init__(self, pairs: Iterable[PairPoint]) -> None:
        self._rates: dict[tuple[float, str], list[tuple[int, InsideRates]]] = defaultdict(list)
        for pair in sorted(pairs, key=lambda pair: pair.first_tokens):
            if pair.mechanism is Mechanism.INSIDE:
                rates = InsideRates(
                    product=pair.first_performance,
                    attention=pair.second_performance,
                    energy_ratio=1.0 if pair.energy_ratio is None else pair.energy_ratio,
                )
                self._rates[pair.share, pair.first].append((pair.first_tokens, rates))

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of products that were measured, increasing."""
        return tuple(sorted({share for share, _ in self._rates}))

    def rates(self, op: Operation, share: float, num_tokens: int) -> InsideRates:
        """Of an operation on so many tokens in the products' lane with attention under way in the other one.

        A product that was not measured is as the slowest of those that were; one of another size as the next larger.
        """
        if not isinstance(op.dims, LinearDims) or not self._rates:
            return _STANDS_STILL
        nearest = min(self.shares, key=lambda other: abs(other - share))
        names = [name for other, name in self._rates if other == nearest]
        found = [self._of_size(nearest, name, num_tokens) for name in names if name == op.name or op.name not in names]
        return min(found, key=lambda rates: rates.product)

    def _of_size(self, share: float, name: str, num_tokens: int) -> InsideRates:
        known = self._rates[share, name]
        place = bisect.bisect_left([count for count, _ in known], num_tokens)
        return known[min(place, len(known) - 1)][1]
