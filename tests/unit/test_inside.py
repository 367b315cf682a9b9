"""Decode attention inside products, without a GPU: who carries what, what is there when, and what is predicted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.cost.inside import Inside, InsideRates
from nanoflow.cost.table import PairPoint
from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.inside import InsideLanes, parts_of
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.executor.reference import ReferenceExecutor
from nanoflow.executor.steps import bind
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import LinearDims, OpKind
from nanoflow.kernels.carrier import share_of, steps_of
from nanoflow.kernels.launch import SHARES, Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.models.config import parse
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.plan import Lane, Mechanism, PipelinePlan, PlanError
from nanoflow.search.inside import can_be_inside, inside_plan
from nanoflow.search.iteration import predict
from nanoflow.search.search import Search
from tests.graphs import batch_of, batches, device_model, graphs, valid_plans, with_fresh_caches
from tests.unit.test_lanes import CONFIG
from tests.unit.test_simulate import GRAPH, SHAPE, profile

MAX_TOKENS = 12
LLAMA = fuse_swiglu(build_graph(preset_config("llama-3-8b"), None))
LANES = (
    Lane(name="products", mechanism=Mechanism.INSIDE, share=0.8),
    Lane(name="attention", mechanism=Mechanism.INSIDE, share=0.2),
)


@dataclass(slots=True)
class Note:
    """Attention of the fake carrier: what is done of it, in rows."""

    launch: Launch
    result: torch.Tensor
    runs_left: int
    taken: int = 0


@dataclass(slots=True)
class ReferenceCarrier:
    """Runs products and attention one after the other by the reference kernels; the result is written at the end."""

    shares: list[int] = field(default_factory=list)
    alone: int = 0

    def rounds(self, dims: LinearDims, num_tokens: int) -> int:
        return num_tokens * dims.in_features * dims.out_features

    def take(self, attention: Launch, max_runs: int) -> Note:
        return Note(attention, torch.full_like(attention.writes[0], torch.nan), max_runs)

    def run(self, product: Launch, taken: Note, until: int) -> None:
        REFERENCE_KERNELS[product.op.kind](product)
        self.shares.append(until - taken.taken)
        self._attend(taken, until)

    def finish(self, taken: Note) -> None:
        self.alone += SHARES - taken.taken
        self._attend(taken, SHARES)
        is_decode = taken.launch.inputs.decodes.context_len[taken.launch.tokens.start : taken.launch.tokens.stop] > 0
        taken.launch.writes[0][is_decode] = taken.result[is_decode]

    def _attend(self, taken: Note, until: int) -> None:
        assert taken.taken <= until <= SHARES and taken.runs_left > 0
        taken.runs_left -= 1
        launch, num_rows = taken.launch, len(taken.result)
        rows = slice(num_rows * taken.taken // SHARES, num_rows * until // SHARES)
        taken.taken = until
        if rows.stop > rows.start:
            first = launch.tokens.start
            REFERENCE_KERNELS[OpKind.DECODE_ATTENTION](
                replace(
                    launch,
                    tokens=TokenRange(start=first + rows.start, stop=first + rows.stop),
                    reads=(launch.reads[0][rows],),
                    writes=(taken.result[rows],),
                )
            )


def inside(plan: PipelinePlan, graph: OpGraph) -> PipelinePlan:
    """A plan with the same order, and decode attention inside the rest."""
    kinds = {op.name: op.kind for op in graph.layer}
    lane = {True: "attention", False: "products"}
    return replace(
        plan,
        lanes=LANES,
        nano_operations=tuple(
            replace(nano, lane=lane[kinds[nano.operation] is OpKind.DECODE_ATTENTION]) for nano in plan.nano_operations
        ),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_order_gives_what_the_reference_gives(data: st.DataObject) -> None:
    """Batches may be smaller than the plan, so that products have no tokens and carry nothing."""
    graph = data.draw(graphs())
    batch = data.draw(batches(MAX_TOKENS, graph.vocab_size))
    plan = inside(data.draw(valid_plans(graph, MAX_TOKENS)), graph)
    expected_model = device_model(graph, int(batch.page_tables.max()) + 1)
    model = with_fresh_caches(expected_model)
    inputs = InputBuilder(graph.rope, num_rows=batch.num_requests, device=torch.device("cpu")).build(batch)

    expected = ReferenceExecutor(expected_model).forward(inputs)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=batch.num_requests)
    for tensor in executor.workspace.tensors.values():
        tensor.fill_(torch.nan)
    lanes = InsideLanes(bind(plan, graph), executor.workspace, ReferenceCarrier())
    executor._lanes[plan.digest] = lanes
    executor.forward(inputs, plan)
    torch.testing.assert_close(executor.logits(inputs), expected, rtol=1e-4, atol=1e-5)


def test_products_of_one_nano_batch_carry_the_attention_of_the_other() -> None:
    """In proportion to their work: all four of a layer, those up to the own attention first where the layers begin."""
    plan = inside_plan(LLAMA, 2048, 1024, 0.8)
    plan.validate(LLAMA)
    steps = bind(plan, LLAMA)
    parts = dict(parts_of(steps, ReferenceCarrier()))
    carried: dict[int, list[tuple[str, int, int]]] = {}
    for place, part in parts.items():
        step, attention = steps[place], steps[part.attention]
        assert step.tokens.start != attention.tokens.start
        carried.setdefault(part.attention, []).append((step.op.name, step.layer - attention.layer, part.until))
    first, *others = carried.values()
    assert first == [("qkv_proj", 0, 256)]
    *middle, last = others
    assert {tuple(found) for found in middle} == {
        (("o_proj", 0, 20), ("gate_up_proj", 0, 158), ("down_proj", 0, 226), ("qkv_proj", 1, 256)),
        (("o_proj", -1, 20), ("gate_up_proj", -1, 158), ("down_proj", -1, 226), ("qkv_proj", 0, 256)),
    }
    assert [name for name, _, _ in last] == ["o_proj", "gate_up_proj", "down_proj"]
    assert len(carried) == 2 * LLAMA.num_layers


def test_what_products_without_tokens_leave_is_done_alone() -> None:
    """A batch that ends in the first nano-batch has nothing in the second."""
    graph = build_graph(parse(CONFIG), None)
    plan = inside_plan(graph, 8, 4, 0.8)
    carrier, batch = ReferenceCarrier(), batch_of([(3, 1), (5, 1), (2, 1)], 3, graph.vocab_size, 0)
    model = device_model(graph, int(batch.page_tables.max()) + 1)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=8, max_logits=3)
    executor._lanes[plan.digest] = InsideLanes(bind(plan, graph), executor.workspace, carrier)
    inputs = InputBuilder(graph.rope, num_rows=3, device=torch.device("cpu")).build(batch)
    executor.forward(inputs, plan)
    assert carrier.shares == [] and carrier.alone == SHARES * graph.num_layers


def test_lanes_inside_each_other_keep_attention_apart() -> None:
    plan = inside_plan(LLAMA, 2048, 1024, 0.8)
    nanos = list(plan.nano_operations)
    place = next(at for at, nano in enumerate(nanos) if nano.operation == "o_proj")
    nanos[place] = replace(nanos[place], lane="attention inside")
    with pytest.raises(PlanError, match=r"o_proj.*takes decode attention alone|lanes inside each other are two"):
        replace(plan, nano_operations=tuple(nanos)).validate(LLAMA)
    one = tuple(replace(nano, lane="products") for nano in plan.nano_operations)
    with pytest.raises(PlanError, match="lanes inside each other are two"):
        replace(plan, nano_operations=one).validate(LLAMA)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_shares_stand_for_steps(steps: int) -> None:
    assert steps_of(share_of(steps)) == steps


def pairs(*found: tuple[int, float, float, float]) -> tuple[PairPoint, ...]:
    """Of so many tokens: share, and what both keep."""
    return tuple(
        PairPoint(
            first="products",
            second="decode_attention",
            first_tokens=tokens,
            second_tokens=340,
            mechanism=Mechanism.INSIDE,
            share=share,
            first_performance=first,
            second_performance=second,
        )
        for tokens, share, first, second in found
    )


def test_rates_are_those_of_the_next_larger_size_and_the_nearest_share() -> None:
    known = Inside(pairs((512, 0.8, 0.7, 0.4), (1024, 0.8, 0.75, 0.45), (1024, 0.67, 0.6, 0.6)))
    product = next(op for op in LLAMA.layer if op.name == "down_proj")
    norm = next(op for op in LLAMA.layer if op.name == "ffn_norm")
    assert known.shares == (0.67, 0.8)
    for tokens, first in ((100, 0.7), (512, 0.7), (513, 0.75), (5000, 0.75)):
        assert known.rates(product, 0.8, tokens).product == first
    assert known.rates(product, 0.7, 512) == InsideRates(product=0.6, attention=0.6)
    assert known.rates(norm, 0.8, 512) == InsideRates(product=1.0, attention=0.0)


def test_a_layer_with_attention_inside_takes_what_the_rates_say() -> None:
    """Products of half of the tokens 2.5 s, attention 2 s: inside, 1.875 s of it are done in the 2.5 / 0.8 s of the
    products, and 0.125 s alone."""
    of = profile(pairs=pairs((512, 0.8, 0.8, 0.6)))
    plan = inside_plan(GRAPH, 512, 256, 0.8)
    assert predict(plan, of, SHAPE).makespan_s == pytest.approx(2 * (2.5 / 0.8 + 0.125), rel=1e-6)
    found = Search(of, SHAPE, is_quick=True).run()
    assert found.plan.lanes == plan.lanes and found.makespan_s == pytest.approx(6.5)


def test_attention_stands_still_beside_what_cannot_carry() -> None:
    """Rates beside products of 0 would make it wait for ever: it runs alone once it is waited for."""
    of = profile(pairs=pairs((512, 0.8, 1.0, 0.0)))
    assert predict(inside_plan(GRAPH, 512, 256, 0.8), of, SHAPE).makespan_s == pytest.approx(9.0)


def test_two_attentions_in_a_layer_are_not_put_inside() -> None:
    attention = next(op for op in LLAMA.layer if op.kind is OpKind.DECODE_ATTENTION)
    assert can_be_inside(LLAMA) and not can_be_inside(replace(LLAMA, layer=(*LLAMA.layer, attention)))


def test_every_place_to_cut_gives_a_valid_plan() -> None:
    for num_tokens, boundary in itertools.product((256, 2048), (1, 128, 255)):
        inside_plan(LLAMA, num_tokens, boundary, 2 / 3).validate(LLAMA)
