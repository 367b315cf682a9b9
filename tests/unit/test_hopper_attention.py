"""Decode attention in Gluon: run by stand-ins on the CPU, and compiled for Hopper, which needs no card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

pytest.importorskip("triton.experimental.gluon")

from nanoflow.graph.operation import KEY_BLOCK, KvType
from nanoflow.kernels.hopper import attention
from nanoflow.kernels.hopper.attention import OCCUPANCIES
from nanoflow.kernels.hopper.attention_fp8_programs import decode_fp8_program
from nanoflow.kernels.hopper.attention_programs import decode_program
from tests import hopper
from tests.attention_cases import assert_decoded, decode_case
from tests.compiling import compiled
from tests.hopper import OnCpu, assert_loaded_once
from tests.kv_fp8_cases import (
    assert_decoded_from_8_bits,
    assert_decoded_in_float32,
    of_all_sizes,
    on_8_bits,
    with_sinks,
)
from tests.unit.test_beside import HEAD_DIM, attention_bytes, attention_registers

# Shared memory and registers of a Hopper SM, and the shared memory that each program takes besides its own.
_SM_BYTES, _SM_REGISTERS, _RESERVED_BYTES = 228 << 10, 1 << 16, 1 << 10


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """Of a type of the KV cache, a group, the size of its heads, and whether it has sinks."""
    variants = ("auto:4:128:0", "fp8_e4m3:4:128:0", "fp8_e4m3:8:64:1")
    return dict(zip(variants, compiled("tests.compile_hopper_attention", *variants), strict=True))


def test_it_compiles_and_all_programs_fit_on_an_sm(reports: dict[str, dict[str, Any]]) -> None:
    for variant, report in reports.items():
        num_programs = OCCUPANCIES[KvType(variant.split(":")[0])].programs_per_sm
        assert report["has_tma"] and not report["num_spills"]
        assert num_programs * (report["shared_bytes"] + _RESERVED_BYTES) <= _SM_BYTES
        assert num_programs * report["registers"] <= _SM_REGISTERS


def test_queries_are_columns_of_products_that_sum_in_32_bits(reports: dict[str, dict[str, Any]]) -> None:
    """The fewest columns there are. Numbers of 8 bits are converted by one instruction for two."""
    for variant, report in reports.items():
        kv_type, _, head_dim, _ = variant.split(":")
        factor = "f16" if kv_type == KvType.FP8 else "bf16"
        assert report["products"] == [f"wgmma.mma_async.sync.aligned.m64n8k16.f32.{factor}.{factor}"]
        per_thread = 2 * KEY_BLOCK * int(head_dim) // 128
        assert report["num_conversions"] == (per_thread // 2 if kv_type == KvType.FP8 else 0)


def test_it_takes_what_is_assumed_beside_products(reports: dict[str, dict[str, Any]]) -> None:
    for kv_type in KvType:
        report = reports[f"{kv_type}:4:{HEAD_DIM}:0"]
        assert report["shared_bytes"] <= attention_bytes()
        assert report["registers"] <= attention_registers()


@pytest.mark.parametrize("num_programs", [1, 3, 8])
@pytest.mark.parametrize("heads", [(6, 2, 128), (16, 2, 64), (3, 1, 64)], ids=str)
@pytest.mark.parametrize("contexts", [(700, 33, 0, 130, 1), (64, 64, 0, 0, 321), (0, 65, 200, 0)], ids=str)
def test_heads_are_complete_and_right(
    contexts: tuple[int, ...], heads: tuple[int, int, int], num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    on_cpu = OnCpu(decode_program)
    monkeypatch.setattr(attention, "decode_program", on_cpu)
    monkeypatch.setattr(attention, "SCAN", 2)
    launch = decode_case(list(contexts), heads, torch.device("cpu"), monkeypatch, 1)
    attention.run_decode(launch, num_programs)
    assert_decoded(launch)
    assert_loaded_once(launch, on_cpu.loads)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("heads", "num_programs"), [((6, 2, 128), 1), ((16, 2, 64), 3)], ids=str)
@pytest.mark.parametrize("contexts", [(33, 300, 0, 130, 1), (0, 65, 200, 0)], ids=str)
def test_heads_in_8_bits_are_complete_and_right(
    contexts: tuple[int, ...],
    heads: tuple[int, int, int],
    num_programs: int,
    has_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    on_cpu = OnCpu(decode_fp8_program)
    monkeypatch.setattr(attention, "decode_fp8_program", on_cpu)
    monkeypatch.setattr(attention, "SCAN", 2)
    launch = on_8_bits(decode_case(list(contexts), heads, torch.device("cpu"), monkeypatch, 1))
    if has_sinks:
        launch = with_sinks(launch)
    attention.run_decode(launch, num_programs)
    assert_decoded_from_8_bits(launch)
    assert_loaded_once(launch, on_cpu.loads)


def test_a_slot_of_8_bits_is_in_registers_before_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rests give the loading warp the time to fill the slot anew."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "decode_fp8_program", OnCpu(decode_fp8_program))
    monkeypatch.setattr(hopper, "ARRIVAL_S", 5e-3)
    launch = on_8_bits(decode_case([500], (3, 1, 128), torch.device("cpu"), monkeypatch))
    attention.run_decode(launch, 1)
    assert_decoded_from_8_bits(launch)


def test_values_of_all_sizes_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "decode_fp8_program", OnCpu(decode_fp8_program))
    launch = of_all_sizes(decode_case([1, 70, 300], (8, 2, 64), torch.device("cpu"), monkeypatch))
    attention.run_decode(launch, 3)
    assert_decoded_in_float32(launch)


def test_sinks_of_keys_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "decode_program", OnCpu(decode_program))
    launch = with_sinks(decode_case([700, 33, 0, 1], (6, 2, 128), torch.device("cpu"), monkeypatch, 1))
    attention.run_decode(launch, 5)
    assert_decoded(launch)


def test_numbers_that_change_from_launch_to_launch_compile_nothing_new() -> None:
    """Launches are made as on a card: what Triton takes for constants, and how it aligns, is what it would be there."""
    first, *later = compiled("tests.launch_hopper")
    # A product, one alone, one whose columns are one tile, and one in FP8.
    assert first == {"carry": 4, "decode": 1, "decode of 8 bits": 1, "merge": 2}
    assert len(later) == 3 and all(counts == first for counts in later)
