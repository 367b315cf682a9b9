"""Decode attention inside products, without a GPU: who carries what, what is there when, and what is predicted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.executor.carry import CarryLanes, parts_of
from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.executor.steps import bind
from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import LinearDims, Operation, OpKind
from nanoflow.kernels.hopper import share_of, steps_of
from nanoflow.kernels.launch import SHARES, Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.models.config_json import parse
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.carry import carriers
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import Lane, PipelinePlan, PlanError
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.carry import CarryRates, CarryTable, filled
from nanoflow.profile.table import PairPoint
from nanoflow.profiler import carry as profiler_carry
from nanoflow.profiler.carry import CarryTask, measure_carry
from nanoflow.profiler.sustained import SPANS, Span
from nanoflow.profiler.work import decode_task
from nanoflow.search.carry import can_be_carried, carry_plan, carrying_runs
from nanoflow.search.search import Search
from nanoflow.simulate.iteration import predict
from tests.graphs import batch_of, batches, device_model, graphs, valid_plans, with_fresh_caches, with_operations
from tests.reference_executor import ReferenceExecutor
from tests.unit.test_lanes import CONFIG
from tests.unit.test_profiler import SITE
from tests.unit.test_simulate import GRAPH, SHAPE, TIMES, profile

MAX_TOKENS = 12
# Of the blocks of `SHAPE`.
FILLED = filled(SHAPE.decode_context / SHAPE.num_decode_tokens)
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

    def rounds(self, op: Operation, num_tokens: int) -> int:
        assert isinstance(op.dims, LinearDims)
        return num_tokens * op.dims.in_features * op.dims.out_features

    def take(self, attention: Launch, max_runs: int) -> Note:
        return Note(attention, torch.full_like(attention.writes[0], torch.nan), max_runs)

    def run(self, product: Launch, taken: Note, until: int) -> None:
        {**REFERENCE_KERNELS, **FP8_KERNELS}[product.op.kind](product)
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


def inside_lanes(plan: PipelinePlan, graph: OpGraph) -> PipelinePlan:
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


class NotingCarrier:
    """Notes what it is to finish, and computes nothing."""

    def __init__(self) -> None:
        self.finished: list[object] = []

    def rounds(self, op: Operation, num_tokens: int) -> int:
        return 1

    def take(self, attention: Launch, max_runs: int) -> Launch:
        return attention

    def run(self, product: Launch, taken: Launch, until: int) -> None:
        raise AssertionError

    def finish(self, taken: Launch) -> None:
        self.finished.append(taken)


def test_attention_that_no_step_has_waited_for_is_done_at_the_end() -> None:
    graph = build_graph(parse(CONFIG), None)
    plan, carrier = inside_lanes(sequential_plan(graph, 4), graph), NotingCarrier()
    executor = PipelinedExecutor(device_model(graph, 1), (plan,), max_batch_tokens=4, max_logits=1)
    steps = bind(plan, graph)
    lanes = CarryLanes(steps, dict(carriers(plan, graph, graph.layers)), executor.workspace, carrier)
    place = next(i for i, step in enumerate(steps) if step.op.kind is OpKind.DECODE_ATTENTION)
    launch: Any = object()
    with lanes.running():
        with lanes.on(place) as workspace:
            workspace.model.kernels[OpKind.DECODE_ATTENTION](launch)
        assert not carrier.finished
    assert carrier.finished == [launch]


@pytest.mark.parametrize("shares", [(1.0, 0.2), (0.8, 1.0), (0.8, 0.21), (1.0, 1e-9)])
def test_no_lane_has_all_of_the_instruction_stream(shares: tuple[float, float]) -> None:
    """With a share of 1 there would be no rate at which products carry attention."""
    graph = build_graph(preset_config("llama-3-8b"), None)
    plan = inside_lanes(sequential_plan(graph, 64), graph)
    plan.validate(graph)
    lanes = tuple(replace(lane, share=share) for lane, share in zip(plan.lanes, shares, strict=True))
    with pytest.raises(PlanError, match=f"each has less than 1 .*, not {shares[0]:g} and {shares[1]:g}") as error:
        replace(plan, lanes=lanes).validate(graph)
    assert "\n" not in str(error.value)


def lanes_of(plan: PipelinePlan, graph: OpGraph, executor: PipelinedExecutor, carrier: ReferenceCarrier) -> CarryLanes:
    """The lanes of a plan, with a carrier that runs anywhere."""
    carried = dict(carriers(plan, graph, graph.layers))
    return CarryLanes(bind(plan, graph), carried, executor.workspace, carrier)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_order_gives_what_the_reference_gives(data: st.DataObject) -> None:
    """Batches may be smaller than the plan, so that products have no tokens and carry nothing."""
    graph = data.draw(graphs())
    batch = data.draw(batches(MAX_TOKENS, graph.vocab_size))
    plan = inside_lanes(data.draw(valid_plans(graph, MAX_TOKENS)), graph)
    expected_model = device_model(graph, int(batch.new_pages.pages.max()) + 1)
    model = with_fresh_caches(expected_model)
    inputs = InputBuilder(graph.ropes, num_rows=batch.num_requests, device=torch.device("cpu")).build(batch)

    expected = ReferenceExecutor(expected_model).forward(inputs)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=batch.num_requests)
    for tensor in executor.workspace.tensors.values():
        tensor.fill_(torch.nan)
    executor._lanes[plan.digest] = lanes_of(plan, graph, executor, ReferenceCarrier())
    executor.forward(inputs, plan)
    torch.testing.assert_close(executor.logits(inputs), expected, rtol=1e-4, atol=1e-5)


def test_products_of_one_nano_batch_carry_the_attention_of_the_other() -> None:
    """In proportion to their work: all four of a layer, those up to the own attention first where the layers begin."""
    plan = carry_plan(LLAMA, 2048, 1024, 0.8)
    plan.validate(LLAMA)
    steps = bind(plan, LLAMA)
    carried: dict[int, list[tuple[str, int, int]]] = {}
    for place, part in parts_of(steps, dict(carriers(plan, LLAMA, LLAMA.layers)), ReferenceCarrier()):
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
    plan = carry_plan(graph, 8, 4, 0.8)
    carrier, batch = ReferenceCarrier(), batch_of([(3, 1), (5, 1), (2, 1)], 3, graph.vocab_size, 0)
    model = device_model(graph, int(batch.new_pages.pages.max()) + 1)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=8, max_logits=3)
    executor._lanes[plan.digest] = lanes_of(plan, graph, executor, carrier)
    inputs = InputBuilder(graph.ropes, num_rows=3, device=torch.device("cpu")).build(batch)
    executor.forward(inputs, plan)
    assert carrier.shares == [] and carrier.alone == SHARES * graph.num_layers


def test_lanes_inside_each_other_keep_attention_apart() -> None:
    plan = carry_plan(LLAMA, 2048, 1024, 0.8)
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


def pair(num_tokens: int, share: float, first: float, second: float = 0.0, products: str = "products") -> PairPoint:
    """Of so many tokens: what both keep at a share; without a second, the first with nothing to carry of a room as
    large as it is long (`TIMES`)."""
    return PairPoint(
        first=products,
        second="decode_attention",
        first_tokens=num_tokens,
        second_tokens=round(100 * TIMES.get(products, 5.0)),
        second_context=1280.0 if second else 0.0,
        mechanism=Mechanism.INSIDE,
        share=share,
        first_performance=first,
        second_performance=second,
    )


def op_named(name: str, graph: OpGraph = LLAMA) -> Operation:
    return next(op for op in graph.layer if op.name == name)


def table_of(*found: PairPoint) -> CarryTable:
    return CarryTable(profile(pairs=found), GRAPH)


def test_rates_are_the_worse_of_the_sizes_around_and_those_of_the_nearest_share() -> None:
    known = table_of(pair(512, 0.8, 0.7, 0.4), pair(1024, 0.8, 0.75, 0.45), pair(1024, 0.67, 0.6, 0.6))
    product = op_named("down_proj")
    assert known.shares == (0.67, 0.8)
    for tokens, first in ((100, 0.7), (512, 0.7), (513, 0.7), (1023, 0.7), (1024, 0.75), (5000, 0.75)):
        assert known.full(product, 0.8, tokens).product == first
    assert known.full(product, 0.7, 512) == CarryRates(product=0.6, attention=0.6)
    assert known.empty(product, 512) == known.empty(op_named("ffn_norm"), 512) == CarryRates()


def test_rates_that_fall_with_the_size_fall_on_beyond_the_largest() -> None:
    known = table_of(pair(512, 0.8, 0.75, 0.4), pair(1024, 0.8, 0.7, 0.45))
    product = op_named("down_proj")
    found = [known.full(product, 0.8, tokens) for tokens in (512, 600, 1024, 2048, 4096, 1 << 40)]
    assert [rates.product for rates in found] == pytest.approx([0.75, 0.7, 0.7, 0.65, 0.6, 0.35])
    assert [rates.attention for rates in found] == pytest.approx([0.4, 0.4, 0.45, 0.45, 0.45, 0.45])


def test_the_newest_of_two_measurements_of_a_size_counts() -> None:
    known = table_of(pair(512, 0.8, 0.7, 0.4), replace(pair(512, 0.8, 0.6, 0.3), second_tokens=500))
    assert known.full(op_named("o_proj"), 0.8, 512).product == 0.6


def test_a_product_that_is_slower_with_nothing_to_carry_is_so_with_attention_too() -> None:
    known = table_of(pair(512, 0.8, 0.7, 0.4), pair(512, 0.8, 0.9), pair(512, 0.8, 0.81, products="o_proj"))
    assert known.shares == (0.8,)
    assert known.empty(op_named("o_proj"), 512) == CarryRates(product=0.81)
    full = known.full(op_named("o_proj"), 0.8, 512)
    assert (full.product, full.attention) == pytest.approx((0.63, 0.36))
    assert known.full(op_named("down_proj"), 0.8, 512) == CarryRates(product=0.7, attention=0.4)


def test_a_product_does_as_much_attention_as_fits_into_it() -> None:
    """A fifth of the time of all products, and three tenths of the room: half as much again as they do on average."""
    roomy = replace(pair(512, 0.8, 0.9, products="o_proj"), second_tokens=150)
    known = table_of(pair(512, 0.8, 0.7, 0.4), pair(512, 0.8, 0.9), roomy)
    full = known.full(op_named("o_proj"), 0.8, 512)
    assert (full.product, full.attention) == pytest.approx((0.7, 0.6))


def test_a_layer_with_attention_inside_takes_what_the_rates_say() -> None:
    """Products of half of the tokens 2.5 s, attention 2 s: inside, 1.875 s of it are done in the 2.5 / 0.8 s of the
    products, and 0.125 s alone."""
    of = profile(pairs=(pair(512, 0.8, 0.8, 0.6 / FILLED),))
    plan = carry_plan(GRAPH, 512, 256, 0.8)
    assert predict(plan, of, SHAPE).makespan_s == pytest.approx(2 * (2.5 / 0.8 + 0.125), rel=1e-6)
    found = Search(of, SHAPE).run()
    assert found.plan.lanes == plan.lanes and found.makespan_s == pytest.approx(6.5)


def test_the_last_block_of_a_context_is_half_empty() -> None:
    assert filled(64.0) == pytest.approx(2 / 3) and filled(8000.0) > 0.99 and filled(0.0) == 1.0
    carried_s = 2.5 / 0.8
    found = predict(carry_plan(GRAPH, 512, 256, 0.8), profile(pairs=(pair(512, 0.8, 0.8, 0.6),)), SHAPE)
    assert found.makespan_s == pytest.approx(2 * (carried_s + 2.0 - 0.6 * FILLED * carried_s))


def test_attention_stands_still_beside_what_cannot_carry() -> None:
    """At no rate it would wait for ever: it runs alone once it is waited for."""
    of = profile(pairs=(replace(pair(512, 0.8, 1.0), second_context=1280.0),))
    assert predict(carry_plan(GRAPH, 512, 256, 0.8), of, SHAPE).makespan_s == pytest.approx(9.0)


def test_products_that_carry_little_pay_for_the_kernel_that_could() -> None:
    """Products of a nano-batch take 2.5 s, at half of their speed 5 s, in which 1.5 s of 2 s of attention are done.
    Of them qkv_proj takes 0.5 s: alone inside it 0.3 s are done in 1 s, and the others run as ever."""
    little = (pair(512, 0.8, 0.5, 0.3 / FILLED), pair(512, 0.8, 0.5), pair(512, 0.8, 0.5, products="qkv_proj"))
    everything = predict(carry_plan(GRAPH, 512, 256, 0.8), profile(pairs=little), SHAPE).makespan_s
    assert everything == pytest.approx(2 * (5.0 + 0.5), rel=1e-6)
    one = predict(carry_plan(GRAPH, 512, 256, 0.8, ("qkv_proj",)), profile(pairs=little), SHAPE).makespan_s
    assert one == pytest.approx(2 * (2.0 + 1.0 + 1.7), rel=1e-6)
    # Where only qkv_proj carries for less than it saves, the search leaves it to that one.
    some = (pair(512, 0.8, 0.6, 0.15 / FILLED), pair(512, 0.8, 0.6), pair(512, 0.8, 0.9, products="qkv_proj"))
    found = Search(profile(pairs=some), SHAPE).run()
    assert "in qkv_proj" in found.plan.name
    assert found.makespan_s == pytest.approx(2 * (2.0 + 0.5 / 0.9 + 2.0 - 0.225 * 0.5 / 0.9))


@pytest.mark.parametrize("carrying", [(), *itertools.islice(carrying_runs(LLAMA), 1, None)], ids=", ".join)
def test_only_products_that_are_to_carry_do(carrying: tuple[str, ...]) -> None:
    for graph in (LLAMA, fuse_swiglu(in_fp8(build_graph(preset_config("llama-3-8b"), None)))):
        _check_who_carries(graph, carrying)


def _check_who_carries(graph: OpGraph, carrying: tuple[str, ...]) -> None:
    plan = carry_plan(graph, 2048, 1024, 0.8, carrying)
    plan.validate(graph)
    steps = bind(plan, graph)
    found = [(steps[at], steps[attention]) for at, attention in carriers(plan, graph, graph.layers)]
    assert {step.op.name for step, _ in found} == set(carrying or {"o_proj", "gate_up_proj", "down_proj", "qkv_proj"})
    assert all(step.tokens != attention.tokens for step, attention in found)


def test_two_attentions_in_a_layer_are_not_put_inside() -> None:
    attention = next(op for op in LLAMA.layer if op.kind is OpKind.DECODE_ATTENTION)
    second = replace(attention, name="second_attention")
    assert can_be_carried(LLAMA) and not can_be_carried(with_operations(LLAMA, (*LLAMA.layer, second)))


def test_every_place_to_cut_gives_a_valid_plan() -> None:
    for num_tokens, boundary in itertools.product((256, 2048), (1, 128, 255)):
        for carrying in carrying_runs(LLAMA):
            carry_plan(LLAMA, num_tokens, boundary, 2 / 3, carrying).validate(LLAMA)


@pytest.mark.parametrize("products", ["products", "o_proj"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_profile_has_what_products_carry_and_what_they_take_with_nothing_to(
    monkeypatch: pytest.MonkeyPatch, products: str, is_empty: bool
) -> None:
    carrier = ReferenceCarrier()
    monkeypatch.setitem(SPANS, "cpu", Span(settle_s=0.0, measure_s=0.001))
    monkeypatch.setattr(profiler_carry, "_carrier", lambda _device, _steps: carrier)
    attention = decode_task(op_named("decode_attention", SITE.graph), 3, 20)
    task = CarryTask(num_tokens=16, steps=4, attention=attention, products=products, is_empty=is_empty)
    [point] = measure_carry(SITE, [task])
    assert point.key == task.key and point.share == 0.8
    assert point.first_performance > 0 and (point.second_performance == 0) is is_empty
    num_products = 4 if products == "products" else 1
    assert sum(carrier.shares[:num_products]) == (0 if is_empty else SHARES)
    assert len(carrier.shares) % num_products == 0 and carrier.alone == 0
