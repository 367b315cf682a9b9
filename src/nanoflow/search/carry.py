"""Plans whose products carry decode attention: one instruction stream, so only an order has to be found.

Two nano-batches run half a layer apart. While one attends, the other runs its products from o_proj on, and those of its
next layer up to its own attention. So each attention has the products of a whole layer that can carry it, and the
stream never waits. A product is a little slower while it carries, so a short attention may be left to a few products.
It is then issued right before the first of them, and what comes after the last one waits for it (`plan/carry.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import TokenRange, split
from nanoflow.graph.operation import Operation, OpKind
from nanoflow.plan.carry import PRODUCTS
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan
from nanoflow.plan.sequential import WHOLE_LANE

PRODUCTS_LANE, ATTENTION_LANE = "products", "attention inside"
_MECHANISM = Mechanism.INSIDE


def carry_plan(
    graph: OpGraph, num_tokens: int, boundary: int, share: float, carrying: Sequence[str] = ()
) -> PipelinePlan:
    """The plan that cuts a batch in two.

    Args:
        graph: Has one decode attention in its layer.
        num_tokens, boundary: Size of the batch, and where to cut it.
        share: Of the products, in the steps of the instruction stream.
        carrying: Products that carry, neighbours in the stream; all of them if empty.
    """
    first, second = split(num_tokens, (boundary,))
    # While period p begins the first nano-batch's attention of layer p - 1, the second one ends layer p - 2.
    nano_operations = _joined((), graph, first, _beside(graph, second, 2, 1), carrying)
    nano_operations = _joined(nano_operations, graph, second, _beside(graph, first, 1, 0), carrying)
    names = "" if not carrying else f" in {', '.join(carrying)}"
    return PipelinePlan(
        name=f"{_MECHANISM} {share:.2f}{names}, 2 nano-batches at {boundary}",
        num_tokens=num_tokens,
        lanes=(
            WHOLE_LANE,
            Lane(name=PRODUCTS_LANE, mechanism=_MECHANISM, share=share),
            Lane(name=ATTENTION_LANE, mechanism=_MECHANISM, share=1.0 - share),
        ),
        nano_operations=nano_operations,
    )


def can_be_carried(graph: OpGraph) -> bool:
    """Whether a layer has one decode attention, and products before and after it."""
    return sum(op.kind is OpKind.DECODE_ATTENTION for op in graph.layer) == 1


def carrying_runs(graph: OpGraph) -> Iterator[tuple[str, ...]]:
    """What may carry, for `carry_plan`: all products, and every run of neighbours, longer ones first."""
    before, _, after = _sections(graph)
    names = tuple(op.name for op in (*after, *before) if op.kind in PRODUCTS)
    yield ()
    for length in range(len(names) - 1, 0, -1):
        yield from (names[first : first + length] for first in range(len(names) - length + 1))


def _sections(graph: OpGraph) -> tuple[list[Operation], Operation, list[Operation]]:
    """What must come before decode attention, it, and what is left: prefill attention needs nothing of it."""
    layer = graph.layer
    place = next(at for at, op in enumerate(layer) if op.kind is OpKind.DECODE_ATTENTION)
    after = [op for op in layer[place + 1 :] if op.kind is not OpKind.PREFILL_ATTENTION]
    prefills = [op for op in layer[place + 1 :] if op.kind is OpKind.PREFILL_ATTENTION]
    return [*layer[:place], *prefills], layer[place], after


def _beside(graph: OpGraph, tokens: TokenRange, stage: int, next_stage: int) -> list[NanoOperation]:
    """What a nano-batch has from its attention of one layer to that of the next."""
    before, _, after = _sections(graph)
    found = [(op, stage) for op in after] + [(op, next_stage) for op in before]
    return [_nano_operation(op, tokens, PRODUCTS_LANE, lag) for op, lag in found]


def _joined(
    so_far: Sequence[NanoOperation],
    graph: OpGraph,
    tokens: TokenRange,
    beside: Sequence[NanoOperation],
    carrying: Sequence[str],
) -> tuple[NanoOperation, ...]:
    """What a plan has so far, and then a nano-batch's attention among what the other one has meanwhile."""
    attention = _nano_operation(_sections(graph)[1], tokens, ATTENTION_LANE, 1)
    names = [nano.operation for nano in beside]
    first = names.index(carrying[0]) if carrying else 0
    after = names.index(carrying[-1]) + 1 if carrying else len(names)
    waiting = [replace(nano, waits=(len(so_far) + first,)) for nano in beside[after:]]
    return (*so_far, *beside[:first], attention, *beside[first:after], *waiting)


def _nano_operation(op: Operation, tokens: TokenRange, lane: str, stage: int) -> NanoOperation:
    return NanoOperation(operation=op.name, start=tokens.start, stop=tokens.stop, lane=lane, stage=stage)
