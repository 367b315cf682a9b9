"""Sampling kernels: the distribution they draw from is the one that transformers' processors make."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.batch import TopLogprobs
from nanoflow.kernels import sample
from tests import sample_cases

CPU = torch.device("cpu")
VOCAB = 50
GRID = 20_000


def _logits(seed: int, rows: int = 1) -> torch.Tensor:
    return 2.5 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def _draw(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniforms: torch.Tensor
) -> torch.Tensor:
    """All rows with the same parameters."""

    def column(value: float) -> torch.Tensor:
        return torch.full((len(logits),), value)

    scale = column(sample.scale_of(temperature))
    if top_k == 0 and top_p == 1.0 and min_p == 0.0:
        return sample.draw(logits, scale, uniforms)
    log_min_p = column(math.log2(min_p) if min_p else -math.inf)
    return sample.draw_filtered(logits, scale, column(top_k).long(), column(top_p), log_min_p, uniforms)


def _frequencies(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """How often each token is drawn when the uniform number sweeps [0, 1): the distribution, to 1 / GRID."""
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = _draw(logits.expand(GRID, -1), temperature, top_k, top_p, min_p, uniforms)
    return torch.bincount(tokens, minlength=VOCAB) / GRID


def _expected(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The same by transformers' processors."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(1, 1, dtype=torch.int64)
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores: torch.Tensor = logits.clone()
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 5, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.7, "min_p": 0.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 1, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.01, "min_p": 0.0},
        {"top_k": 1000, "top_p": 1.0, "min_p": 1.0},
    ],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any], temperature: float) -> None:
    logits = _logits(3)
    frequencies = _frequencies(logits, temperature=temperature, **filters)
    expected = _expected(logits, temperature=temperature, **filters)
    torch.testing.assert_close(frequencies, expected, atol=2 / GRID, rtol=0)


def test_filters_that_keep_all_change_nothing() -> None:
    logits, uniforms = _logits(0, rows=64), torch.linspace(0.001, 0.999, 64, dtype=torch.float64)
    filtered = _frequencies(logits[:1], temperature=1.0, top_k=VOCAB, top_p=1.0, min_p=0.0)
    free = _frequencies(logits[:1], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    torch.testing.assert_close(filtered, free, atol=2 / GRID, rtol=0)
    alone = torch.cat([_draw(logits[i : i + 1], 0.9, 5, 0.8, 0.0, uniforms[i : i + 1]) for i in range(64)])
    assert _draw(logits, 0.9, 5, 0.8, 0.0, uniforms).tolist() == alone.tolist()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform: float) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [7, 20]] = torch.tensor([1.0, 2.0])
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    for top_k in (0, 10):
        token = _draw(logits, 1.0, top_k, 1.0, 0.0, uniforms)
        assert token.item() in (7, 20)


def test_uniform_numbers_are_uniform_and_differ() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    positions = np.tile(np.arange(200, dtype=np.int64), 200)
    numbers = sample.uniform(seeds, positions)
    assert len(np.unique(numbers)) == len(numbers)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 800) ** 2 / 800).sum()
    assert chi_square < 95  # 49 degrees of freedom: beyond 95 with probability 1e-4
    grid = numbers.reshape(200, 200)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_token_by_token(seed: int, repetition: float, presence: float, frequency: float) -> None:
    """Against the definition, written as a loop."""
    rng = np.random.default_rng(seed)
    logits = _logits(seed)
    prompt, generated = rng.integers(0, VOCAB, 10), rng.integers(0, VOCAB, 15)
    expected = logits.clone()
    for token in range(VOCAB):
        if token in prompt or token in generated:
            value = expected[0, token]
            expected[0, token] = value / repetition if value > 0 else value * repetition
        count = int((generated == token).sum())
        expected[0, token] -= frequency * count + presence * (count > 0)
    counts = torch.bincount(torch.from_numpy(generated), minlength=VOCAB).int()[None]
    is_in_prompt = torch.zeros(1, VOCAB, dtype=torch.bool)
    is_in_prompt[0, prompt] = True
    one = torch.ones(1)
    sample.apply_penalties(logits, counts, is_in_prompt, one * repetition, one * presence, one * frequency)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def _top(logits: torch.Tensor, chosen: torch.Tensor) -> list[Any]:
    return [tensor.numpy() for tensor in sample.top_logprobs(logits, torch.arange(len(logits)), chosen, 3)]


def test_top_logprobs() -> None:
    logits = _logits(1, rows=4)
    expected = torch.log_softmax(logits, -1)
    chosen = torch.tensor([0, 5, 9, int(logits[3].argmax())])
    top = TopLogprobs(**dict(zip(("token_ids", "logprobs", "ranks"), _top(logits, chosen), strict=True)))
    assert top.token_ids[:, 0].tolist() == chosen.tolist()
    assert top.token_ids[:, 1:].tolist() == expected.topk(3).indices.tolist()
    np.testing.assert_allclose(top.logprobs[:, 0], expected[torch.arange(4), chosen], rtol=1e-6)
    order = logits.argsort(-1, descending=True)
    assert top.ranks.tolist() == [order[i].tolist().index(chosen[i]) + 1 for i in range(4)]
    assert top.ranks[3] == 1


@pytest.mark.parametrize("num_rows", [1, 3, 200])
def test_slices_change_nothing_but_the_memory(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = sample_cases.filter_columns()
    count = len(columns["scale"])
    logits, tables = _logits(5, count), sample_cases.tables(count, VOCAB)
    columns |= sample_cases.adjusted_columns(count)
    numbers = sample_cases.numbers(count, **columns)
    whole, others = sample_cases.to(tables, CPU), sample_cases.to(tables, CPU)
    expected = sample.choose(logits, numbers, whole)
    places, chosen = torch.arange(count - 1, -1, -1), torch.zeros(count, dtype=torch.int64)
    expected_top = sample.top_logprobs(logits, places, chosen, 4)
    monkeypatch.setattr(sample, "_MAX_ELEMENTS", num_rows * VOCAB)
    for one, other in zip(sample.choose(logits, numbers, others), expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(sample.top_logprobs(logits, places, chosen, 4), expected_top, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(whole.seen, others.seen) and not torch.equal(whole.seen, tables.seen)


def test_no_rows() -> None:
    token_ids, best = sample.choose(torch.empty(0, VOCAB), sample_cases.numbers(0), sample_cases.tables(1, VOCAB))
    assert (len(token_ids), len(best)) == (0, 0)


def test_a_count_stops_below_the_bit_of_the_prompt() -> None:
    tables = sample_cases.tables(1, VOCAB)
    tables.seen.fill_(sample.IN_PROMPT | sample.MAX_COUNT)
    numbers = sample_cases.numbers(1, has_penalties=1)
    sample.choose(_logits(1), numbers, tables)
    assert bool((tables.seen == sample.IN_PROMPT | sample.MAX_COUNT).all())


@pytest.mark.parametrize(("top_k", "top_p"), [(VOCAB, 1.0), (30, 0.9)])
def test_draws_of_many_seeds_follow_the_distribution(top_k: int, top_p: float) -> None:
    numbers = sample_cases.numbers(20_000, scale=sample.scale_of(1.0), top_k=top_k, top_p=top_p)
    logits = _logits(3)
    token_ids, _ = sample.choose(logits.expand(20_000, -1), numbers, sample_cases.tables(1, VOCAB))
    sample_cases.assert_distribution(token_ids, logits[0], top_k=top_k, top_p=top_p)
    with pytest.raises(AssertionError):
        sample_cases.assert_distribution(token_ids, 1.1 * logits[0], top_k=top_k, top_p=top_p)
