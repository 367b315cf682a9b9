"""Plans whose decode attention runs inside products: one instruction stream, so the order is all there is to find.

Two nano-batches half a layer apart: while one attends, the other has its products from o_proj on, and those of its
next layer up to its own attention. Each attention so has a layer's products to run inside, and the stream never waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import TokenRange, split
from nanoflow.graph.operation import Operation, OpKind
from nanoflow.plan.plan import Lane, Mechanism, NanoOperation, PipelinePlan
from nanoflow.plan.sequential import WHOLE_LANE

PRODUCTS_LANE, ATTENTION_LANE = "products", "attention inside"


def inside_plan(graph: OpGraph, num_tokens: int, boundary: int, share: float) -> PipelinePlan:
    """The plan that cuts a batch in two.

    Args:
        graph: Has one decode attention in its layer.
        num_tokens, boundary: Size of the batch, and where to cut it.
        share: Of the products, in the steps of the instruction stream.
    """
    before, attention, after = _sections(graph)
    first, second = split(num_tokens, (boundary,))
    # While period p begins the first nano-batch's attention of layer p - 1, the second one ends layer p - 2.
    order = (
        (attention, first, 1),
        (after, second, 2),
        (before, second, 1),
        (attention, second, 1),
        (after, first, 1),
        (before, first, 0),
    )
    return PipelinePlan(
        name=f"{Mechanism.INSIDE} {share:.2f}, 2 nano-batches at {boundary}",
        num_tokens=num_tokens,
        lanes=(
            WHOLE_LANE,
            Lane(name=PRODUCTS_LANE, mechanism=Mechanism.INSIDE, share=share),
            Lane(name=ATTENTION_LANE, mechanism=Mechanism.INSIDE, share=1.0 - share),
        ),
        nano_operations=tuple(
            itertools.chain.from_iterable(_nano_operations(section, tokens, stage) for section, tokens, stage in order)
        ),
    )


def can_be_inside(graph: OpGraph) -> bool:
    """Whether a layer has one decode attention, and products before and after it."""
    return sum(op.kind is OpKind.DECODE_ATTENTION for op in graph.layer) == 1


def _sections(graph: OpGraph) -> tuple[list[Operation], list[Operation], list[Operation]]:
    """What must come before decode attention, it, and what is left: prefill attention needs nothing of it."""
    place = next(at for at, op in enumerate(graph.layer) if op.kind is OpKind.DECODE_ATTENTION)
    attention = graph.layer[place]
    before = [*graph.layer[:place]]
    after = [op for op in graph.layer[place + 1 :] if op.kind is not OpKind.PREFILL_ATTENTION]
    prefills = [op for op in graph.layer[place + 1 :] if op.kind is OpKind.PREFILL_ATTENTION]
    return [*before, *prefills], [attention], after


def _nano_operations(section: Sequence[Operation], tokens: TokenRange, stage: int) -> Iterator[NanoOperation]:
    for op in section:
        lane = ATTENTION_LANE if op.kind is OpKind.DECODE_ATTENTION else PRODUCTS_LANE
        yield NanoOperation(operation=op.name, start=tokens.start, stop=tokens.stop, lane=lane, stage=stage)
