"""Programs of sampling in Triton against their twins in torch, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.kernels import sample
from nanoflow.kernels import triton_sample as fast
from tests import sample_cases
from tests.all_cases import RUNS_ALL_CASES, covering, part
from tests.compiling import compiled

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KINDS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", KINDS, ids=str)
SIZES = (1, 2, 7, 131, 256, 257, 1025)
# Several blocks to a row of a vocabulary that the interpreter gets through.
BLOCKS = fast.RowBlocks(block=256, num_warps=4, room=32)


def _logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (spread * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def _assert_twins(logits: Tensor, numbers: Tensor, tables: sample.SampleTables, **options: Any) -> Tensor:
    ours, expected = sample_cases.to(tables, CPU), sample_cases.to(tables, CPU)
    token_ids, best = fast.choose(logits, numbers, ours, blocks=BLOCKS, **options)
    other_ids, other_best = sample.choose(logits, numbers, expected)
    assert token_ids.tolist() == other_ids.tolist()
    assert torch.equal(best, other_best) and torch.equal(ours.seen, expected.seen)
    return token_ids


@DTYPES
def test_every_combination_of_filters(dtype: torch.dtype) -> None:
    columns = sample_cases.filter_columns()
    # Neither 7 nor 17 divides the number of any filter's values; other rows for each dtype.
    every = slice(5 * KINDS.index(dtype), None, 7 if RUNS_ALL_CASES else 17)
    taken = {name: values[every] for name, values in columns.items()}
    assert all(set(values) == set(columns[name]) for name, values in taken.items())
    columns = taken
    count = len(columns["scale"])
    numbers = sample_cases.numbers(count, **columns)
    _assert_twins(_logits(count, 300, dtype), numbers, sample_cases.tables(1, 300), adjusts=False)


@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [
        (dtype, size)
        for place, size in enumerate(SIZES)
        for kind, dtype in enumerate(KINDS)
        if RUNS_ALL_CASES or (place + kind) % len(KINDS) == 0
    ],
    ids=str,
)
def test_vocabularies(dtype: torch.dtype, vocab_size: int) -> None:
    rows = np.arange(12)
    numbers = sample_cases.numbers(
        12, top_k=rows % 5, top_p=np.where(rows % 2, 0.9, 1.0), scale=np.where(rows % 4 == 3, 0.0, 1.5)
    )
    _assert_twins(_logits(12, vocab_size, dtype), numbers, sample_cases.tables(1, vocab_size))


# Logits are adjusted in float32, whatever they were.
@pytest.mark.parametrize("dtype", KINDS if RUNS_ALL_CASES else KINDS[1:2], ids=str)
def test_adjusted_rows(dtype: torch.dtype) -> None:
    rows = np.arange(18)
    columns = sample_cases.adjusted_columns(18)
    filters: dict[str, Any] = {
        "top_k": rows % 9,
        "top_p": np.where(rows % 2, 0.9, 1.0),
        "scale": np.where(rows % 4 == 3, 0.0, 1.5),
    }
    numbers = sample_cases.numbers(18, **columns, **filters)
    _assert_twins(_logits(18, 300, dtype), numbers, sample_cases.tables(18, 300))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_forbidden_tokens_are_never_chosen(scale: float) -> None:
    """Of rows that look for them; that no token is left shows in the largest logit."""
    logits, tables = _logits(8, 300), sample_cases.tables(8, 300)
    tables.seen[2] |= sample.FORBIDDEN
    is_restricted = np.arange(8) != 6
    numbers = sample_cases.numbers(8, scale=scale, is_restricted=is_restricted, top_p=0.9)
    rows = torch.arange(8).flip(0)
    ours = sample_cases.to(tables, CPU)
    token_ids, best = fast.choose(logits, numbers, ours, blocks=BLOCKS)
    assert torch.equal(ours.seen, tables.seen)  # nothing is counted without penalties
    assert torch.equal(best.isneginf(), rows == 2)
    is_forbidden = tables.seen[rows, token_ids] < 0
    assert not is_forbidden[(rows != 2) & torch.from_numpy(is_restricted)].any()
    keeps = [place for place in range(8) if rows[place] != 2]
    expected, _ = sample.choose(logits, numbers, sample_cases.to(tables, CPU))
    assert token_ids[keeps].tolist() == expected[keeps].tolist()


def test_without_adjustments_the_draws_are_the_same() -> None:
    numbers, tables = sample_cases.numbers(6, top_p=0.8), sample_cases.tables(1, 300)
    one, other = (_assert_twins(_logits(6, 300), numbers, tables, adjusts=adjusts) for adjusts in (False, True))
    assert torch.equal(one, other)


@pytest.mark.parametrize("value", part([-3.0], of=[0.0, -3.0, 2.5]))
def test_equal_logits(value: float) -> None:
    """Filters cut among equals: those of lower ids stay."""
    logits = torch.full((8, 300), value)
    logits[4:, ::3] += 1.0
    rows = np.arange(8)
    columns: dict[str, Any] = {
        "top_k": np.where(rows % 2, 1 + 35 * rows, 0),
        "top_p": np.where(rows % 3, 0.01 + rows / 9, 1.0),
    }
    _assert_twins(logits, sample_cases.numbers(8, **columns), sample_cases.tables(1, 300))


def test_tokens_that_cannot_be_drawn() -> None:
    logits = _logits(6, 300)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.9] = -torch.inf
    rows = np.arange(6)
    columns: dict[str, Any] = {"top_k": (rows % 3) * 40, "top_p": np.where(rows % 2, 0.7, 1.0)}
    token_ids = _assert_twins(logits, sample_cases.numbers(6, **columns), sample_cases.tables(1, 300))
    assert bool((logits[torch.arange(6), token_ids] > -torch.inf).all())


def test_what_a_sample_of_the_row_does_not_show() -> None:
    """A peak so high that weights relative to the sample's largest overflow, and one at the row's end."""
    logits = _logits(4, 1025)
    logits[:2, 1000], logits[2:, 1024] = 200.0, 9.0
    columns: dict[str, Any] = {"top_k": [0, 40, 0, 400], "top_p": [0.5, 0.9, 0.97, 0.97], "scale": [1.5, 1.5, 1.5, 0.3]}
    _assert_twins(logits, sample_cases.numbers(4, **columns), sample_cases.tables(1, 1025), adjusts=False)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_rows_that_are_not_finite_stay_alone(scale: float) -> None:
    logits = _logits(8, 300)
    clean = logits.clone()
    logits[1, 200], logits[3, 5], logits[6] = torch.nan, torch.inf, -torch.inf
    numbers, tables = sample_cases.numbers(8, scale=scale, top_p=0.9), sample_cases.tables(1, 300)
    token_ids, best = fast.choose(logits, numbers, tables, blocks=BLOCKS)
    expected, _ = sample.choose(clean, numbers, tables)
    is_finite = torch.tensor([row not in (1, 3, 6) for row in range(8)])
    assert torch.equal(best.isfinite(), is_finite)
    assert torch.equal(token_ids[is_finite], expected[is_finite])
    assert bool(((token_ids >= 0) & (token_ids < 300)).all())
    if scale == 0.0:
        assert torch.equal(fast.largest(logits, BLOCKS)[1].isfinite(), is_finite)


@DTYPES
@pytest.mark.parametrize("vocab_size", [1, 131, 1025])
def test_largest(dtype: torch.dtype, vocab_size: int) -> None:
    logits = _logits(9, vocab_size, dtype, spread=0.1)
    for ours, other in zip(fast.largest(logits, BLOCKS), sample.largest(logits), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(("vocab_size", "dtype"), covering([1, 15, 131, 1025], KINDS), ids=str)
def test_top_logprobs(vocab_size: int, dtype: torch.dtype) -> None:
    logits = _logits(9, vocab_size, dtype)
    logits[4, vocab_size // 2 + 1 :] = -torch.inf
    places = torch.tensor([4, 0, 7, 7])
    token_ids = torch.tensor([0, vocab_size - 1, 0, int(logits[7].argmax())])
    ids, logprobs, ranks = fast.top_logprobs(logits, places, token_ids, 20, blocks=BLOCKS)
    _, expected, expected_ranks = sample.top_logprobs(logits, places, token_ids, 20)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ranks, expected_ranks) and torch.equal(ids[:, 0].long(), token_ids)
    order = logits[places].float().sort(dim=-1, descending=True, stable=True)[1]
    assert torch.equal(ids[:, 1:].long(), order[:, :20])


def test_logprobs_of_a_whole_vocabulary_are_those_of_the_twin() -> None:
    """One token after the other would take a reading of the row for each."""
    logits, places, token_ids = _logits(2, 4097, torch.float32), torch.tensor([1]), torch.tensor([7])
    found = fast.top_logprobs(logits, places, token_ids, 4097, blocks=BLOCKS)
    for field, expected in zip(found, sample.top_logprobs(logits, places, token_ids, 4097), strict=True):
        assert torch.equal(field, expected)
    assert found[0].shape == (1, 4098)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over the tokens that top_k and top_p leave, of draws with as many seeds."""
    num_draws, vocab_size = 40, 12
    logits = _logits(1, vocab_size, spread=1.0).expand(num_draws, -1).contiguous()
    numbers = sample_cases.numbers(num_draws, scale=sample.scale_of(1.0), top_k=8, top_p=0.9)
    token_ids, _ = fast.choose(logits, numbers, sample_cases.tables(1, vocab_size), blocks=BLOCKS, adjusts=False)
    sample_cases.assert_distribution(token_ids, logits[0], top_k=8, top_p=0.9)


def test_uniform_numbers_are_those_of_the_host() -> None:
    """Over a vocabulary of equal logits the token says the number."""
    logits = torch.zeros(24, 1024)
    numbers = sample_cases.numbers(24, first_position=2**30)
    token_ids, _ = fast.choose(logits, numbers, sample_cases.tables(1, 1024), blocks=BLOCKS, adjusts=False)
    host = numbers.numpy().view(sample.NUMBERS)[:, 0]
    expected = sample.uniform(host["seed"], host["position"].astype(np.int64))
    assert token_ids.tolist() == np.floor(expected * 1024).astype(int).tolist()


@pytest.mark.slow
def test_programs_compile_for_hopper() -> None:
    """In bfloat16 little is spilled, outside the loops over a row; more would be inside."""
    (reports,) = compiled("tests.compile_sample")
    spills = {name: report["num_spills"] for name, report in reports.items() if "bf16" in name}
    assert len(spills) == (4 if RUNS_ALL_CASES else 3) and max(spills.values()) <= 64
    assert len(reports) - len(spills) == (3 if RUNS_ALL_CASES else 0)
    assert all("LDG.E.128" in report["loads"] for report in reports.values())
