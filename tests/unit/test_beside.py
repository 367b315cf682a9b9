"""A product and decode attention fit beside each other on every SM of a Hopper card, which needs no card to see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

pytest.importorskip("triton.experimental.gluon")

from nanoflow.graph.operation import KEY_BLOCK, AttentionDims, KvType, OpKind
from nanoflow.kernels.gemm_tiles import BESIDE_TILES, GemmTiles, with_addend
from nanoflow.kernels.hopper import attention
from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.restricted import kernels_beside, kernels_on
from tests.all_cases import part
from tests.compiling import compiled
from tests.gemm_cases import (
    assert_linear,
    assert_linear_swiglu,
    exact_linear,
    exact_linear_swiglu,
    linear_add_case,
    linear_case,
    linear_swiglu_case,
)
from tests.sm_record import shared_sms

# Shared memory and registers of an SM, and the shared memory that each program takes besides its own.
SM_BYTES, SM_REGISTERS, RESERVED_BYTES = 228 << 10, 1 << 16, 1 << 10
# Of a thread; the most that an instruction can name, and what the card hands out at once.
MOST_REGISTERS, REGISTER_STEP = 255, 8
# A warpgroup that computes, and one of which a warp loads.
ATTENTION_WARPS = 8
# Barriers, and what warps exchange.
SCRATCH_BYTES = 1 << 10
ITEM_BYTES = 2
HEAD_DIM = 128
TILES = pytest.mark.parametrize("tiles", BESIDE_TILES, ids=lambda tiles: f"{tiles.block_m}x{tiles.block_n}")


def attention_bytes() -> int:
    """Shared memory of a program with the largest heads: keys and values in flight, queries and weights."""
    in_flight = 2 * attention.OCCUPANCIES[KvType.MODEL].num_stages * KEY_BLOCK * HEAD_DIM
    return (in_flight + (HEAD_DIM + KEY_BLOCK) * MAX_GROUP) * ITEM_BYTES + SCRATCH_BYTES


def attention_registers() -> int:
    """Registers of a program."""
    return ATTENTION_WARPS * 32 * attention.OCCUPANCIES[KvType.MODEL].max_registers


def product_registers(tiles: GemmTiles) -> int:
    """Registers of a program, at most."""
    of_thread = tiles.max_registers or MOST_REGISTERS
    return -(-of_thread // REGISTER_STEP) * REGISTER_STEP * 32 * tiles.num_warps


@TILES
@pytest.mark.parametrize("is_gated", [False, True])
def test_both_fit_on_an_sm(tiles: GemmTiles, is_gated: bool) -> None:
    for cut in (tiles, with_addend(tiles)):
        products = cut.shared_memory_bytes(is_gated=is_gated) + RESERVED_BYTES
        attentions = attention.PROGRAMS_BESIDE * (attention_bytes() + RESERVED_BYTES)
        assert products + attentions <= SM_BYTES
    assert product_registers(tiles) + attention.PROGRAMS_BESIDE * attention_registers() <= SM_REGISTERS


@TILES
def test_a_second_product_does_not(tiles: GemmTiles) -> None:
    """Else those of two rounds could take the place of attention; the last resort for other cards may."""
    if tiles is not BESIDE_TILES[-1]:
        assert 2 * (tiles.shared_memory_bytes(is_gated=True) + RESERVED_BYTES) > SM_BYTES


def test_products_take_what_is_assumed() -> None:
    """Those that are held to fewer registers than they would take; and nothing is kept elsewhere for want of them."""
    held = [place for place, tiles in enumerate(BESIDE_TILES) if tiles.max_registers]
    # The largest tiles need most.
    places = part(held[:1], of=held)
    for place, reports in zip(places, compiled("tests.compile_gemm", *map(str, places)), strict=True):
        tiles = BESIDE_TILES[place]
        assert len(reports) == 3
        for report in reports:
            assert report["shared_bytes"] <= tiles.shared_memory_bytes(is_gated=False)
            assert report["registers"] <= product_registers(tiles)
            assert report["num_spills"] == 0


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("num_tokens", [3, 130])
def test_kernels_of_a_lane(num_tokens: int) -> None:
    """In the interpreter, which multiplies no bfloat16."""
    kernels = kernels_beside(REFERENCE_KERNELS, 5)
    cpu, dtype = torch.device("cpu"), torch.float16
    launch = linear_case(num_tokens, (272, 136), dtype, cpu)
    kernels[OpKind.LINEAR](launch)
    assert_linear(launch.writes[0], exact_linear(launch))
    added, expected = linear_add_case(num_tokens, (272, 136), dtype, cpu)
    kernels[OpKind.LINEAR_ADD](added)
    assert_linear(added.writes[0], expected)
    gated = linear_swiglu_case(num_tokens, (272, 72), dtype, cpu)
    kernels[OpKind.LINEAR_SWIGLU](gated)
    assert_linear_swiglu(gated.writes[0], exact_linear_swiglu(gated))


def test_attention_has_programs_for_what_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs an SM on lanes of their own, one beside a product; a kernel that cannot be told stays."""
    counts: list[int] = []
    monkeypatch.setattr(attention, "run_decode", lambda _launch, num_programs: counts.append(num_programs))
    dims = AttentionDims(num_heads=1, num_kv_heads=1, head_dim=8, scale=1.0)
    cache = SimpleNamespace(keys=torch.empty(1, 1, PAGE_TOKENS, 8))
    launch = cast(Launch, SimpleNamespace(op=SimpleNamespace(dims=dims), cache=cache))
    ours = {**REFERENCE_KERNELS, OpKind.DECODE_ATTENTION: attention.decode_attention}
    for restricted in (kernels_on, kernels_beside):
        restricted(ours, 100)[OpKind.DECODE_ATTENTION](launch)
        of_reference = restricted(REFERENCE_KERNELS, 100)
        assert of_reference[OpKind.DECODE_ATTENTION] is REFERENCE_KERNELS[OpKind.DECODE_ATTENTION]
    assert counts == [300, 100]


def test_sms_are_shared_where_programs_were_there_together() -> None:
    """On SM 0 one followed the other, on SM 1 they overlap, on SM 2 there was one only."""
    first = torch.tensor([[0, 0, 10], [1, 0, 10], [2, 0, 10]])
    second = torch.tensor([[0, 10, 20], [1, 9, 19], [3, 0, 10]])
    assert shared_sms(first, second) == {1}
