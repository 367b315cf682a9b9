"""Products with decode attention inside: run by stand-ins on the CPU, and compiled for Hopper, which needs no card."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

pytest.importorskip("triton.experimental.gluon")

from nanoflow.graph.operation import LinearDims, OpKind
from nanoflow.kernels.hopper import can_carry, carry
from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS, PANEL
from nanoflow.kernels.hopper.carry_programs import carry_program
from nanoflow.kernels.hopper.merge import merge_program
from nanoflow.kernels.launch import SHARES
from tests.all_cases import RUNS_ALL_CASES
from tests.attention_cases import (
    assert_close,
    assert_decoded,
    carrier_case,
    decode_case,
    dims_of,
    exact,
    without_nan,
)
from tests.compiling import compiled
from tests.fp8_cases import assert_product, carried_case, product_case
from tests.gemm_cases import assert_linear, assert_linear_swiglu, assert_surroundings_untouched
from tests.hopper import Machine, OnCpu, assert_loaded_once
from tests.unit.test_hopper_merge import attended

CPU = torch.device("cpu")
SM_BYTES = 227 << 10


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Products of [tokens, N, K] that carry attention of these contexts until these shares, by so many programs."""

    products: tuple[tuple[str, int, int, int], ...]
    contexts: tuple[int, ...]
    shares: tuple[int, ...]
    num_programs: int = 2
    steps: int = 4
    heads: tuple[int, int, int] = (6, 2, 128)
    first: int = 0


PROBLEMS = {
    "tiles on some programs only": Problem(
        products=(("linear", 200, 600, 200), ("bias", 130, 264, 72)),
        contexts=(700, 33, 0, 130, 1),
        shares=(100, 200),
        num_programs=5,
    ),
    "more tiles than blocks": Problem(
        products=(("add", 300, 520, 264),), contexts=(65, 0, 200), shares=(SHARES,), num_programs=3
    ),
    "more blocks than rounds": Problem(
        products=(("linear", 64, 256, 256), ("add", 128, 256, 512)), contexts=(1300, 640), shares=(128, 250), first=1
    ),
    "rounds of two steps, heads of 64": Problem(
        products=(("swiglu", 140, 528, 520),), contexts=(64, 64, 321), shares=(200,), steps=2, heads=(16, 2, 64)
    ),
    "k-steps that no rounds of three divide": Problem(
        products=(("linear", 140, 528, 520), ("add", 130, 264, 72)), contexts=(600, 65, 321), shares=(150, 256), steps=3
    ),
    "SwiGLU, other rows before": Problem(
        products=(("swiglu", 140, 528, 200), ("linear", 1, 256, 256)),
        contexts=(70, 0, 192, 0, 256, 0, 0, 64),
        shares=(64, 64),
        first=3,
        num_programs=3,
    ),
    "one program, rows without keys": Problem(
        products=(("linear", 128, 256, 512),), contexts=(65, 0, 0, 130, 0, 0, 64), shares=(200,), num_programs=1
    ),
    "SwiGLU in narrow tiles, then wide ones": Problem(
        products=(("swiglu", 140, 1056, 520), ("bias", 140, 2304, 200)),
        contexts=(700, 33, 0, 130),
        shares=(170, 220),
        num_programs=18,
        steps=2,
    ),
    "no rows with keys": Problem(products=(("linear", 128, 256, 256),), contexts=(0, 0), shares=(128,)),
    "FP8, k-steps that no rounds divide": Problem(
        products=(("add fp8", 130, 272, 144), ("swiglu fp8", 140, 528, 656)), contexts=(600, 65, 321), shares=(100, 250)
    ),
    "as many blocks as k-steps, which is too many": Problem(
        products=(("linear", 129, 512, 200),), contexts=(130,), shares=(200,), steps=1, heads=(2, 1, 64)
    ),
    "FP8 in narrow tiles, then 16 bits": Problem(
        products=(("bias fp8", 70, 400, 400), ("swiglu fp8", 70, 272, 272), ("linear", 64, 256, 256)),
        contexts=(300, 33, 0, 130),
        shares=(120, 200, 230),
        num_programs=4,
        steps=2,
    ),
    "no product": Problem(products=(), contexts=(320, 64, 640), shares=(), num_programs=3),
    "programs without any": Problem(
        products=(("linear", 128, 256, 256),), contexts=(64,), shares=(SHARES,), num_programs=6
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_products_and_attention_are_complete_and_right(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    on_cpu = OnCpu(carry_program)
    monkeypatch.setattr(carry, "carry_program", on_cpu)
    monkeypatch.setattr(carry, "SCAN", 2)
    carried = decode_case(list(problem.contexts), problem.heads, CPU, monkeypatch, problem.first)
    carrier = carry.HopperCarrier(num_sms=problem.num_programs, steps=problem.steps)
    taken = carrier.take(carried, len(problem.shares) + 1)
    # What is not written is not looked at.
    taken.sums.fill_(torch.nan)
    taken.log_sums.fill_(torch.nan)
    for (kind, num_tokens, *shape), until in zip(problem.products, problem.shares, strict=True):
        case, kind = (carried_case, kind[:-4]) if kind.endswith(" fp8") else (carrier_case, kind)
        launch, expected = case(kind, num_tokens, (shape[0], shape[1]), CPU)
        carrier.run(launch, taken, until)
        if kind == "swiglu":
            assert_linear_swiglu(launch.writes[0], expected)
        elif expected.dtype == torch.float32:
            assert_product(launch.writes[0], expected, has_fast_sums=False)
        else:
            assert_linear(launch.writes[0], expected)
        if launch.op.kind is OpKind.LINEAR_ADD:
            assert_surroundings_untouched(launch.writes[0])
    carrier.finish(taken)
    assert taken.until == SHARES
    assert_decoded(carried)
    assert_loaded_once(carried, on_cpu.loads)


def test_sums_that_overflow_leave_the_next_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(carry, "carry_program", OnCpu(carry_program))
    carried = decode_case([130, 70, 200], (6, 2, 128), CPU, monkeypatch)
    assert carried.cache is not None
    expected = exact(replace(carried, cache=without_nan(carried.cache)))
    for page in carried.inputs.pages[0].decode_tables[0, : -(-130 // PAGE_TOKENS)]:
        carried.cache.values[int(page)] = torch.finfo(torch.bfloat16).max
    carrier = carry.HopperCarrier(num_sms=1, steps=2)
    taken = carrier.take(carried, 2)
    # Some blocks are carried, the others are not.
    carrier.run(carrier_case("linear", 64, (256, 512), CPU)[0], taken, 128)
    carrier.finish(taken)
    assert not carried.writes[0][0].isfinite().any()
    assert_close(carried.writes[0][1:], expected[1:])


@pytest.mark.parametrize("seed", range(300))
def test_runs_follow_each_other_and_those_with_a_tile_less_are_longer(seed: int) -> None:
    source = random.Random(seed)
    num_programs = source.choice([1, 2, 3, 7, 66, 132])
    num_tiles = source.choice([0, 1, num_programs - 1, num_programs, source.randrange(5 * num_programs)])
    num_rounds, extra = source.randrange(60), source.randrange(100)
    num_blocks = source.choice([0, 1, source.randrange(2 * num_programs), source.randrange(100 * num_programs)])
    run_of = Machine(0, num_programs).function("_run")
    runs = [run_of(which, num_programs, num_tiles, num_rounds, extra, num_blocks) for which in range(2 * num_programs)]
    place = 0
    for begin, length in runs:
        assert begin == place and length >= 0
        place += length
    assert place == num_blocks
    num_busy = 2 * (num_tiles % num_programs)
    busy, idle = runs[:num_busy], runs[num_busy:]
    # Alike on either side, up to a block and what the end cuts off; nothing is left over for the last ones.
    whole = [length for begin, length in idle if begin + length < num_blocks]
    assert max((length for _, length in busy), default=0) - min((length for _, length in busy), default=0) <= 1
    assert max(whole, default=0) - min(whole, default=0) <= 1
    most = max((length for _, length in busy), default=0)
    assert all(most - 1 <= length <= most + extra for length in whole) if busy else True
    assert all(length <= most + extra + 1 for _, length in idle) if busy else True


@pytest.mark.parametrize("seed", range(16))
def test_heads_that_runs_share_are_merged_and_the_others_left_alone(seed: int) -> None:
    torch.manual_seed(seed)
    source = random.Random(seed)
    group, kv_heads, head_dim, block, first_row = source.randint(1, MAX_GROUP), source.randint(1, 3), 16, 4, 2
    contexts = [source.choice([0, 1, 4, source.randrange(60)]) for _ in range(source.randint(1, 7))]
    blocks = [-(-context // block) for context in contexts]
    key_blocks = torch.tensor([0, 3, 5, *blocks]).int()
    key_blocks[3:] = 5 + key_blocks[3:].cumsum(0)
    total = sum(blocks) * kv_heads
    begins = _begins(source, total)
    stops, num_parts = [*begins[1:], total], len(begins)
    out = torch.full((len(contexts), kv_heads, group, head_dim), torch.nan)
    expected = out.clone()
    # Parts that no run wrote are NaN.
    parts = torch.full((2 * num_parts, MAX_GROUP, head_dim), torch.nan)
    log_sums = torch.full((2 * num_parts, MAX_GROUP), torch.nan)
    stop = 0
    for row, context in enumerate(contexts):
        for head in range(kv_heads):
            begin, stop = stop, stop + blocks[row]
            values, scores = torch.randn(max(context, 1), head_dim), 30 * torch.randn(group, max(context, 1))
            at = [run for run in range(num_parts) if max(begin, begins[run]) < min(stop, stops[run])]
            if len(at) < 2:
                continue
            expected[row, head] = attended(values, scores, 0, context)[0]
            for run in at:
                first, last = max(begin, begins[run]) - begin, min(stop, stops[run]) - begin
                mean, log_sum = attended(values, scores, first * block, min(last * block, context))
                place = 2 * run + (first == 0)
                parts[place, :group], log_sums[place, :group] = mean, log_sum
    merge_program[(num_parts,)](
        out,
        parts,
        log_sums,
        torch.tensor(begins).int(),
        key_blocks,
        first_row,
        len(contexts),
        group,
        kv_heads,
        head_dim,
        MAX_GROUP,
        2,
    )
    torch.testing.assert_close(out, expected, equal_nan=True)


def _begins(source: random.Random, total: int) -> list[int]:
    """Of runs of several launches, each of which takes what comes after the last; some are empty."""
    cuts = sorted(source.randint(0, total) for _ in range(source.randint(0, 3)))
    begins = []
    for first, last in zip([0, *cuts], [*cuts, total], strict=True):
        inside = sorted(source.randint(first, last) for _ in range(source.randint(1, 8)))
        begins += [first, *(place for place in inside for _ in range(source.choice([1, 1, 3])))]
    return begins


@pytest.mark.slow
def test_it_compiles_for_hopper_and_waits_only_where_nothing_is_to_be_under_way() -> None:
    # Every kind of product and of tiles, and both sizes of heads; the first keeps most registers elsewhere.
    variants = ["256:2:1:1:4:128:2", "256:4:2:0:8:64:1", "128:8:0:0:4:128:2"]
    more = ["256:4:0:0:4:128:2", "128:4:1:1:4:128:2", "256:4:2:0:8:64:2"]
    more += ["256:2:1:1:4:128:1", "256:2:2:0:4:128:1", "128:4:1:1:4:128:1"]
    variants += more if RUNS_ALL_CASES else []
    for variant, report in zip(variants, compiled("tests.compile_hopper_carry", *variants), strict=True):
        _, steps, *_, head_dim, _ = (int(part) for part in variant.split(":"))
        panels = head_dim // PANEL
        # Of either warpgroup, with a block and without; a product of 32 bytes of features or keys an instruction.
        places = 2 * 2 * PANEL // 16
        assert report["shared_bytes"] <= SM_BYTES
        # Few of them stand in loops; the accumulator, which would be hundreds, is not among them.
        assert report["spills"] <= 100, variant
        # A round's, and one k-step without.
        assert report["products_of_tiles"] == places // 2 * (steps + 1)
        assert report["products_of_attention"] == places * 2 * panels
        assert report["waits_for_all_but_one"] == 2 * (steps + 1)
        assert report["waits_for_all"] == 2 * 3


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # Tokens, columns, features, SMs, steps.
        ((1024, 6144, 4096, 132, 4), 2 * 16),
        ((1024, 4096, 4096, 128, 4), 16),
        ((1024, 4096, 4096, 128, 3), 21),
        ((1, 1, 1, 132, 4), 0),
        ((129, 256, 257, 3, 2), 2),
        # Narrow tiles, no more of them for a program than of wide ones, and half the rounds each.
        ((512, 4096, 4096, 132, 4), 8),
        ((512, 14336, 4096, 132, 4), 2 * 16),
        ((1, 1, 449, 132, 4), 1),
        ((129, 257, 257, 3, 2), 2 * 1),
    ],
)
def test_rounds_of_the_busiest_program(sizes: Sequence[int], expected: int) -> None:
    num_tokens, num_columns, num_features, num_sms, steps = sizes
    carrier = carry.HopperCarrier(num_sms=num_sms, steps=steps)
    product = carrier_case("linear", 1, (1, 8), CPU)[0].op
    dims = LinearDims(in_features=num_features, out_features=num_columns)
    assert carrier.rounds(replace(product, dims=dims), num_tokens) == expected
    # A k-step in FP8 has twice as many features.
    in_fp8 = replace(product, kind=OpKind.LINEAR_FP8, dims=replace(dims, in_features=2 * num_features))
    assert carrier.rounds(in_fp8, num_tokens) == expected


def test_what_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "carry_program", OnCpu(carry_program))
    carried = decode_case([64], (6, 2, 128), CPU, monkeypatch)
    carrier = carry.HopperCarrier(num_sms=1, steps=4)
    taken = carrier.take(carried, 2)
    product, _ = carrier_case("linear", 8, (256, 64), CPU)
    carrier.run(product, taken, 100)
    for until in (99, SHARES + 1):
        with pytest.raises(ValueError, match=f"a share of attention from 100 to {until}"):
            carrier.run(product, taken, until)
    odd, _ = carrier_case("linear", 8, (256, 63), CPU)
    with pytest.raises(ValueError, match="TMA takes contiguous rows"):
        carrier.run(odd, taken, 200)
    wide = torch.empty((8, 512), dtype=torch.bfloat16)[:, :256]
    with pytest.raises(ValueError, match="has rows every 512 elements"):
        carrier.run(replace(product, writes=(wide,)), taken, 200)
    in_blocks = product_case(8, (256, 64), torch.bfloat16, CPU, is_blocked=True)
    with pytest.raises(ValueError, match=r"scales \[2, 1\] of blocks of a weight; a carrier takes one for each row"):
        carrier.run(replace(in_blocks, op=replace(in_blocks.op, kind=OpKind.LINEAR_FP8)), taken, 200)
    assert (taken.num_runs, taken.until) == (1, 100)
    assert not can_carry(CPU, torch.bfloat16, dims_of((6, 2, 128), None))
