"""Experts kept in MXFP4: words and scales, products of them by Triton's interpreter, and models that are served so."""

# mypy: allow-untyped-decorators
from __future__ import annotations

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

# isort: split
from nanoflow.graph.experts import ClampedSwiglu
from nanoflow.kernels import triton_experts_mxfp4 as fast
from nanoflow.kernels.mxfp4_tiles import Mxfp4Tiles
from nanoflow.models.mxfp4 import lay_out, numbers_of
from tests.expert_cases import ROUTINGS, ExpertCase, exact
from tests.gemm_cases import assert_linear, assert_linear_swiglu
from tests.mxfp4 import quantise
from tests.mxfp4_cases import packed

CPU = torch.device("cpu")
SMALL = Mxfp4Tiles(max_rows=0, block_m=16, block_n=64, block_k=64, num_stages=2, programs_per_sm=1, group_m=2)
CLAMPED = ClampedSwiglu(alpha=1.702, limit=0.75)


def _case(routing: str, num_tokens: int, *, is_plain: bool = False) -> ExpertCase:
    """Sizes that end within tiles and steps, more tiles of an expert than one."""
    torch.manual_seed(num_tokens)
    return ExpertCase(
        num_experts=4,
        per_token=2,
        width=96,
        inner=96,
        ids=ROUTINGS[routing](num_tokens, 4, 2, CPU),
        dtype=torch.bfloat16,
        has_biases=not is_plain,
        clamped=None if is_plain else CLAMPED,
    )


@pytest.mark.parametrize("is_gated", [False, True])
def test_words_stand_for_the_numbers_of_a_checkpoint(is_gated: bool) -> None:
    """Every code at every place, with scales from the least to the greatest that are kept."""
    torch.manual_seed(0)
    blocks, _, _ = quantise(torch.randn(2, 48, 64).numpy())
    scales = torch.randint(0, 129, (2, 48, 2), dtype=torch.uint8)
    codes = torch.stack((torch.from_numpy(blocks) % 16, torch.from_numpy(blocks) // 16), dim=-1).flatten(-2)
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    expected = (sizes[codes.long()] * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2)
    if is_gated:
        expected = torch.cat((expected[:, ::2], expected[:, 1::2]), 1)
    words = torch.from_numpy(blocks).reshape(2, 48, 32).contiguous().view(torch.int32)
    powers = scales.reshape(2, 2, 48).clone()
    lay_out(words, powers, is_gated=is_gated)
    assert torch.equal(numbers_of(words, powers, is_gated=is_gated).double(), expected)
    assert torch.equal(powers[0, :, 0], scales[0, 0]), "the scales of the first row, whatever the order of others"


def test_some_matrices_at_a_time_are_laid_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    words, scales = torch.randint(-(2**31), 2**31, (3, 32, 8)).int(), torch.randint(0, 129, (3, 2, 32)).byte()
    once, twice = ((words.clone(), scales.clone()) for _ in range(2))
    lay_out(*once, is_gated=True)
    monkeypatch.setattr("nanoflow.models.mxfp4._WORDS_AT_ONCE", 1)
    lay_out(*twice, is_gated=True)
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])


@pytest.mark.parametrize(
    ("routing", "num_tokens", "num_programs", "is_plain"), [("skewed", 20, 2, False), ("balanced", 3, 9, True)]
)
def test_grouped_products(routing: str, num_tokens: int, num_programs: int, is_plain: bool) -> None:
    """As the same numbers in bfloat16, with biases and a clamped activation, and without."""
    case = _case(routing, num_tokens, is_plain=is_plain)
    launch, twin = packed(case.first())
    fast.run_experts_in(launch, SMALL, num_programs)
    assert_linear_swiglu(launch.writes[0], exact(twin))
    launch, twin = packed(case.second())
    fast.run_experts_out(launch, SMALL, num_programs)
    assert_linear(launch.writes[0], exact(twin))
