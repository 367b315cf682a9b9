"""How fast a product and the decode attention inside it are, from measured pairs; a part of `interference.py`.

A product carries attention at a fixed rate, so many k-steps to a block of keys, which its lane's share stands for. The
rate fixes how much attention there is beside how much product: what is left of either runs alone, a product that is to
carry in the kernel that could. Nothing but a product carries, so attention stands still beside anything else.

Measured are the products of a layer together with the attention that fills them, and each with nothing to carry. One of
them is as much slower than all of them as it is with nothing to carry, and has the attention that fits into it. What is
measured has contexts of whole blocks of keys, which requests have not.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import KEY_BLOCK, LinearDims, Operation
from nanoflow.plan.mechanisms import Measured
from nanoflow.profile.table import CostTable, Profile

# What a pair calls the products of a layer, one after the other.
PRODUCTS = "products"


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryRates:
    """What both sides keep of their speed alone, and the energy of both of that alone, one after the other."""

    product: float = 1.0
    attention: float = 0.0
    energy_ratio: float = 1.0


STANDS_STILL = CarryRates()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Empty:
    """Of products with nothing to carry: what they keep of their speed, and how much attention they could carry."""

    rates: CarryRates
    capacity: float


def filled(context: float) -> float:
    """The part of their blocks that keys of a mean context fill: of a request the last block is half empty."""
    return context / (context + KEY_BLOCK / 2) if context else 1.0


class CarryTable:
    """The pairs of a profile whose mechanism is INSIDE; of two of one size the later one counts."""

    def __init__(self, profile: Profile, graph: OpGraph) -> None:
        self._full: dict[float, dict[int, CarryRates]] = defaultdict(dict)
        self._empty: dict[str, dict[int, _Empty]] = defaultdict(dict)
        for pair in profile.pairs:
            if pair.mechanism.traits.measured is not Measured.CARRIED:
                continue
            rates = CarryRates(
                product=pair.first_performance,
                attention=pair.second_performance,
                energy_ratio=1.0 if pair.energy_ratio is None else pair.energy_ratio,
            )
            if pair.second_context:
                self._full[pair.share][pair.first_tokens] = rates
            else:
                self._empty[pair.first][pair.first_tokens] = _Empty(rates=rates, capacity=pair.second_tokens)
        self._known: dict[tuple[str, float, int], CarryRates] = {}
        self._products = [op.key for op in graph.layer if isinstance(op.dims, LinearDims)]
        self._table = CostTable(profile, graph) if self._empty else None

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of products that were measured, increasing."""
        return tuple(sorted(self._full))

    def full(self, op: Operation, share: float, num_tokens: int) -> CarryRates:
        """Of a product of so many tokens with attention in it, at the nearest rate."""
        if not self._full:
            return STANDS_STILL
        key = (op.key, share, num_tokens)
        if key not in self._known:
            rates = self._full[min(self._full, key=lambda other: abs(other - share))]
            measured = {size: self._full_at(op, rates[size], size) for size in rates}
            self._known[key] = _between(measured, num_tokens)
        return self._known[key]

    def _full_at(self, op: Operation, layer: CarryRates, num_tokens: int) -> CarryRates:
        """Of one product, from what all of a layer's have at a measured size."""
        own, every = self._empty.get(op.key), self._empty.get(PRODUCTS)
        if own is None or every is None or self._table is None:
            return layer
        size = measured_size(own, num_tokens)
        one, total = own[size], every[size]
        slower = one.rates.product / total.rates.product
        # In the time that it takes it does what fits into it.
        times_s = {name: self._table.cost(name, size).time_s for name in self._products}
        denser = one.capacity / total.capacity * sum(times_s.values()) / times_s[op.key]
        return CarryRates(
            product=layer.product * slower,
            attention=layer.attention * slower * denser,
            energy_ratio=layer.energy_ratio,
        )

    def empty(self, op: Operation, num_tokens: int) -> CarryRates:
        """Of a product of so many tokens that could carry, and has nothing to; as any product if not measured."""
        known = self._empty.get(op.key)
        return _between({size: each.rates for size, each in known.items()}, num_tokens) if known else STANDS_STILL


def _between(measured: Mapping[int, CarryRates], num_tokens: int) -> CarryRates:
    """Rates at a size that was not measured; see `at_size`."""
    return CarryRates(
        product=at_size(measured, num_tokens, lambda size: measured[size].product),
        attention=at_size(measured, num_tokens, lambda size: measured[size].attention),
        energy_ratio=-at_size(measured, num_tokens, lambda size: -measured[size].energy_ratio),
    )


def measured_size(known: Iterable[int], num_tokens: int) -> int:
    """Of sizes that were measured: the next larger one, or the largest."""
    return min((size for size in known if size >= num_tokens), default=max(known))


def at_size(known: Iterable[int], num_tokens: int, value: Callable[[int], float]) -> float:
    """What is known at measured sizes, at any size, where more is better; never better than what was measured.

    Between two sizes the worse of both. Beyond the largest one as there, or worse if it falls towards there: then it
    falls on with every doubling, down to the half. Below the smallest as there.
    """
    sizes = sorted(known)
    place = bisect.bisect_left(sizes, num_tokens)
    if place < len(sizes):
        found = [value(size) for size in sizes[max(place - 1, 0) : place + 1]]
        return found[-1] if sizes[place] == num_tokens or place == 0 else min(found)
    last = value(sizes[-1])
    if len(sizes) == 1 or sizes[-2] <= 0:
        return last
    a_doubling = (last - value(sizes[-2])) / math.log2(sizes[-1] / sizes[-2])
    return last + max(min(a_doubling, 0.0) * math.log2(num_tokens / sizes[-1]), -abs(last) / 2)
