"""How fast a product is that carries decode attention, and how fast that attention, from the pairs of a profile.

A product that carries computes a block of keys after every so many of its k-steps. That rate is fixed for a plan; the
share of the products' lane stands for it. So there is a fixed amount of attention beside a product. What is left over
of either runs alone: a product that the plan wants to carry still runs in the kernel that can. Attention stands still
while anything runs that does not carry it.

A profile has all products of a layer together with the attention that fills them, and each product in the same kernel
with nothing to carry. From these the rates of one product follow. We assume that a product's slowdown relative to the
layer's average is the same with and without attention, and that it carries as much as fits between its k-steps.
Measured contexts are whole blocks of keys; those of requests are not, which `filled` corrects.
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
    """What a product and its attention keep of their speed alone.

    `energy_ratio` is the energy of both together / that of both alone, one after the other.
    """

    product: float = 1.0
    attention: float = 0.0
    energy_ratio: float = 1.0


STANDS_STILL = CarryRates()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Empty:
    """Products with nothing to carry.

    Attributes:
        rates: What they keep of their speed.
        capacity: Tokens of decode attention that they could carry.
    """

    rates: CarryRates
    capacity: float


def filled(context: float) -> float:
    """The filled part of the blocks of keys, for requests with `context` keys on average.

    A request's last block is half empty on average.
    """
    return context / (context + KEY_BLOCK / 2) if context else 1.0


class CarryTable:
    """Speeds of products and the attention they carry, looked up in a profile; of two equal pairs the later counts."""

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
        """Rates of a product of so many tokens while it carries, at the measured rate nearest to a share."""
        if not self._full:
            return STANDS_STILL
        key = (op.key, share, num_tokens)
        if key not in self._known:
            rates = self._full[min(self._full, key=lambda other: abs(other - share))]
            measured = {size: self._full_at(op, rates[size], size) for size in rates}
            self._known[key] = _between(measured, num_tokens)
        return self._known[key]

    def _full_at(self, op: Operation, layer: CarryRates, num_tokens: int) -> CarryRates:
        """Rates of one product, from those of all products of a layer (`layer`) at a measured size."""
        own, every = self._empty.get(op.key), self._empty.get(PRODUCTS)
        if own is None or every is None or self._table is None:
            return layer
        size = measured_size(own, num_tokens)
        one, total = own[size], every[size]
        slower = one.rates.product / total.rates.product
        # Attention per second of product, relative to the layer's average.
        times_s = {name: self._table.cost(name, size).time_s for name in self._products}
        denser = one.capacity / total.capacity * sum(times_s.values()) / times_s[op.key]
        return CarryRates(
            product=layer.product * slower,
            attention=layer.attention * slower * denser,
            energy_ratio=layer.energy_ratio,
        )

    def empty(self, op: Operation, num_tokens: int) -> CarryRates:
        """Rates of a product of so many tokens in the kernel that can carry, with nothing to carry.

        Without a measurement: those of any product.
        """
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
    """A value at any size, from the values at measured sizes; larger values are better.

    Between two measured sizes it is the worse of both. Below the smallest size it is the value there. Beyond the
    largest size it is the value there; if values fell towards it, they fall by as much with every further doubling, at
    most to half.

    Args:
        known: The measured sizes.
        num_tokens: The size that is asked for.
        value: The value at a measured size.
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
