"""Two lanes as one stream: products carry the decode attention that is issued before them.

Everything is queued on the current stream in issue order. A step on the attention's lane is only taken note of; the
products that carry it (`plan/carry.py`) each do a part in proportion to their own work. What is not done when a step
waits for it, because a batch has left products without tokens, is done alone. The kernels that carry are
`kernels/hopper/carry.py`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from nanoflow.executor.buffers import Workspace
from nanoflow.executor.steps import Step
from nanoflow.graph.operation import Operation, OpKind
from nanoflow.kernels.launch import SHARES, Kernel, Launch
from nanoflow.plan.carry import PRODUCTS


class Carrier(Protocol):
    """Products with decode attention inside, on one device."""

    def rounds(self, op: Operation, num_tokens: int) -> int:
        """How long a product takes, in what shares of attention are in proportion to."""

    def take(self, attention: Launch, max_runs: int) -> Any:
        """Attention that at most so many products, and `finish`, are going to do; queues nothing."""

    def run(self, product: Launch, taken: Any, until: int) -> None:
        """Queue a product, and with it the attention that is left up to so many of `SHARES`."""

    def finish(self, taken: Any) -> None:
        """Queue what is left of the attention, and write its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What a product carries: of the attention at this place of the steps, everything up to so many of `SHARES`."""

    attention: int
    until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """Attention under way: its place, and the carrier's note of it."""

    place: int
    note: Any


class CarryLanes:
    """See `lanes.Lanes`.

    Args:
        steps: What runs.
        carried: Places of the steps that carry, and of the attention that each of them does.
        workspace: Tensors, and kernels for what runs by itself.
        carrier: Runs products with attention inside.
    """

    def __init__(
        self, steps: tuple[Step, ...], carried: Mapping[int, int], workspace: Workspace, carrier: Carrier
    ) -> None:
        self._steps, self._carrier = steps, carrier
        self._parts = dict(parts_of(steps, carried, carrier))
        self._taken: _Taken | None = None
        self._place = 0
        kernels = workspace.model.kernels
        carrying: dict[OpKind, Kernel] = {
            kind: partial(self._multiply, kernels[kind]) for kind in PRODUCTS if kind in kernels
        }
        taking: dict[OpKind, Kernel] = {OpKind.DECODE_ATTENTION: self._take}
        self._workspace = replace(workspace, model=replace(workspace.model, kernels={**kernels, **carrying, **taking}))

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `lanes.Lanes`."""
        self._taken = None
        yield
        self._finish()

    @contextmanager
    def on(self, place: int) -> Iterator[Workspace]:
        """See `lanes.Lanes`."""
        self._place = place
        if self._taken is not None and any(before >= self._taken.place for before in self._steps[place].waits):
            self._finish()
        yield self._workspace

    def _take(self, attention: Launch) -> None:
        self._finish()
        num_products = sum(part.attention == self._place for part in self._parts.values())
        self._taken = _Taken(place=self._place, note=self._carrier.take(attention, num_products + 1))

    def _multiply(self, alone: Kernel, product: Launch) -> None:
        part = self._parts.get(self._place)
        if self._taken is None or part is None or part.attention != self._taken.place:
            alone(product)
        else:
            self._carrier.run(product, self._taken.note, part.until)

    def _finish(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            self._carrier.finish(taken.note)


def parts_of(steps: Sequence[Step], carried: Mapping[int, int], carrier: Carrier) -> Iterator[tuple[int, _Part]]:
    """Place of each step that carries, and what.

    The last product takes what the others leave; one without tokens leaves its part to the next.
    """
    products: dict[int, list[int]] = defaultdict(list)
    for place, attention in sorted(carried.items()):
        products[attention].append(place)
    for attention, places in products.items():
        ends = shares_by_rounds([_rounds(steps[place], carrier) for place in places])
        for place, until in zip(places, ends, strict=True):
            yield place, _Part(attention=attention, until=until)


def shares_by_rounds(rounds: Sequence[int]) -> list[int]:
    """Until where an attention is done, in `SHARES`, once each of several products has carried in all of its rounds."""
    return [round(SHARES * done / max(sum(rounds), 1)) for done in itertools.accumulate(rounds)]


def _rounds(step: Step, carrier: Carrier) -> int:
    return carrier.rounds(step.op, step.tokens.num_tokens)
