"""Decode attention in Gluon: run by stand-ins on the CPU, and compiled for Hopper, which needs no card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

pytest.importorskip("triton.experimental.gluon")

from nanoflow.kernels.hopper import attention
from nanoflow.kernels.hopper.attention_programs import decode_program
from tests.attention_cases import assert_decoded, decode_case
from tests.compiling import compiled
from tests.hopper import OnCpu, assert_loaded_once
from tests.unit.test_beside import HEAD_DIM, attention_bytes, attention_registers

# Shared memory and registers of a Hopper SM, and the shared memory that each program takes besides its own.
_SM_BYTES, _SM_REGISTERS, _RESERVED_BYTES = 228 << 10, 1 << 16, 1 << 10
_PROGRAMS_PER_SM = 3


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """Of a group and the size of its heads."""
    variants = ("4:128", "8:64")
    return dict(zip(variants, compiled("tests.compile_hopper_attention", *variants), strict=True))


def test_it_compiles_and_three_programs_fit_on_an_sm(reports: dict[str, dict[str, Any]]) -> None:
    for report in reports.values():
        # Queries are columns of the products, the fewest there are.
        assert report["has_columns_of_queries"] and report["has_tma"]
        assert _PROGRAMS_PER_SM * (report["shared_bytes"] + _RESERVED_BYTES) <= _SM_BYTES
        assert _PROGRAMS_PER_SM * report["registers"] <= _SM_REGISTERS


def test_it_takes_what_is_assumed_beside_products(reports: dict[str, dict[str, Any]]) -> None:
    report = reports[f"4:{HEAD_DIM}"]
    assert report["shared_bytes"] <= attention_bytes()
    assert report["registers"] == attention_registers()


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


def test_numbers_that_change_from_launch_to_launch_compile_nothing_new() -> None:
    """Launches are made as on a card: what Triton takes for constants, and how it aligns, is what it would be there."""
    first, *later = compiled("tests.launch_hopper")
    # A product, one alone, one whose columns are one tile, and one in FP8.
    assert first == {"carry": 4, "decode": 1, "merge": 2}
    assert len(later) == 3 and all(counts == first for counts in later)
