"""How fast a product and the decode attention inside it are, from measured pairs; a part of `interference.py`.

A product carries attention at a fixed rate, so many k-steps to a block of keys, which its lane's share stands for. The
rate fixes how much attention there is beside how much product: what is left of either runs alone, a product that is to
carry in the kernel that could. Nothing but a product carries, so attention stands still beside anything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from nanoflow.cost.table import PairPoint
from nanoflow.graph.operation import LinearDims, Operation
from nanoflow.plan.plan import Mechanism

# What a pair calls the products of a layer, one after the other.
PRODUCTS = "products"


@dataclass(frozen=True, slots=True, kw_only=True)
class InsideRates:
    """What both sides keep of their speed alone, and the energy of both of that alone, one after the other."""

    product: float = 1.0
    attention: float = 0.0
    energy_ratio: float = 1.0


STANDS_STILL = InsideRates()
_BySize = dict[int, InsideRates]


class Inside:
    """The pairs of a profile whose mechanism is INSIDE: with attention, and of what could carry but has none."""

    def __init__(self, pairs: Iterable[PairPoint]) -> None:
        self._full: dict[float, _BySize] = defaultdict(dict)
        self._empty: dict[str, _BySize] = defaultdict(dict)
        for pair in pairs:
            if pair.mechanism is Mechanism.INSIDE:
                rates = InsideRates(
                    product=pair.first_performance,
                    attention=pair.second_performance,
                    energy_ratio=1.0 if pair.energy_ratio is None else pair.energy_ratio,
                )
                known = self._full[pair.share] if pair.second_tokens else self._empty[pair.first]
                known[pair.first_tokens] = rates

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of products that were measured, increasing."""
        return tuple(sorted(self._full))

    def full(self, op: Operation, share: float, num_tokens: int) -> InsideRates:
        """Of a product of so many tokens with attention in it, at the nearest rate.

        Measured of a layer's products; one of them is as much slower as it is with nothing to carry.
        """
        if not self._full:
            return STANDS_STILL
        layer = _of_size(self._full[min(self._full, key=lambda other: abs(other - share))], num_tokens)
        slower = self._empty_rates(op.name, num_tokens).product / self._empty_rates(PRODUCTS, num_tokens).product
        return InsideRates(
            product=layer.product * slower, attention=layer.attention * slower, energy_ratio=layer.energy_ratio
        )

    def empty(self, op: Operation, num_tokens: int) -> InsideRates:
        """Of a product of so many tokens that could carry, and has nothing to."""
        return self._empty_rates(op.name, num_tokens) if isinstance(op.dims, LinearDims) else STANDS_STILL

    def _empty_rates(self, name: str, num_tokens: int) -> InsideRates:
        """What was not measured is as all products of a layer; with nothing measured, as fast as any other product."""
        known = self._empty.get(name) or self._empty.get(PRODUCTS)
        return _of_size(known, num_tokens) if known else STANDS_STILL


def _of_size(known: _BySize, num_tokens: int) -> InsideRates:
    """Those of the next larger size, or of the largest."""
    return known[min((size for size in known if size >= num_tokens), default=max(known))]
