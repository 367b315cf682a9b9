"""Sampling on the device: compiled programs against their twins at a real vocabulary, and no wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoflow.batch import DenseBatch, Joined
from nanoflow.executor.sampler import Sampler, sampling_bytes
from nanoflow.kernels import sample
from nanoflow.profiler.site import equal_requests
from nanoflow.request import SamplingParams
from tests import sample_cases
from tests.families import make_model
from tests.integration.test_sampling import check_that_spoilt_requests_end_alone

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.kernels import triton_sample

pytestmark = pytest.mark.gpu
VOCAB_SIZE, DEVICE = 128256, torch.device("cuda")
SIZES = pytest.mark.parametrize("num_rows", [1, 7, 64, 1000])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
# Rows of a thousand whose token rounding may decide: see `triton_sample.py`.
MOST_OTHER = 3


def _logits(num_rows: int, dtype: torch.dtype, spread: float = 1.0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(num_rows)
    logits = spread * torch.randn(num_rows, vocab_size, generator=generator, device=DEVICE)
    return logits.to(dtype)


def _assert_twins(logits: Tensor, numbers: Tensor, tables: sample.SampleTables | None = None) -> None:
    num_rows = len(logits)
    tables = tables or sample_cases.tables(1, logits.shape[1])
    ours, expected = sample_cases.to(tables, DEVICE), sample_cases.to(tables, DEVICE)
    token_ids, best = triton_sample.choose(logits, numbers.to(DEVICE), ours)
    other_ids, other_best = sample.choose(logits, numbers.to(DEVICE), expected)
    torch.testing.assert_close(best, other_best, rtol=0, atol=0)
    num_other = int((token_ids != other_ids).sum())
    assert num_other <= num_rows * MOST_OTHER // 1000, f"{num_other} of {num_rows} tokens are others"
    if num_other == 0:
        assert torch.equal(ours.seen, expected.seen)


@SIZES
@DTYPES
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "columns",
    [
        {"scale": 0.0},
        {},
        {"top_p": 0.95},
        {"top_k": 50},
        {"top_k": 5000, "top_p": 0.5},
        {"log_min_p": np.log2(0.05)},
        {"top_k": 300, "top_p": 0.9, "log_min_p": -9.0},
    ],
    ids=str,
)
def test_choose(num_rows: int, dtype: torch.dtype, spread: float, columns: dict[str, Any]) -> None:
    _assert_twins(_logits(num_rows, dtype, spread), sample_cases.numbers(num_rows, **columns))


@DTYPES
def test_every_combination_of_filters(dtype: torch.dtype) -> None:
    columns = sample_cases.filter_columns()
    num_rows = len(columns["scale"])
    _assert_twins(_logits(num_rows, dtype), sample_cases.numbers(num_rows, **columns))


@DTYPES
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_adjusted_rows(dtype: torch.dtype, top_p: float) -> None:
    columns = sample_cases.adjusted_columns(48)
    numbers = sample_cases.numbers(48, **columns, top_p=top_p, top_k=np.arange(48) % 7)
    _assert_twins(_logits(48, dtype), numbers, sample_cases.tables(48, VOCAB_SIZE))


@pytest.mark.parametrize("vocab_size", [1, 7, 131, 8191, 8193, 151936, 262144])
def test_vocabularies(vocab_size: int) -> None:
    numbers = sample_cases.numbers(64, top_k=np.arange(64) % 5, top_p=np.where(np.arange(64) % 2, 0.9, 1.0))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _assert_twins(_logits(64, dtype, vocab_size=vocab_size), numbers)


@SIZES
@DTYPES
def test_largest(num_rows: int, dtype: torch.dtype) -> None:
    logits = _logits(num_rows, dtype)
    best, token_ids = logits.max(-1)
    ours_ids, ours_best = triton_sample.largest(logits)
    assert torch.equal(ours_best, best.float())
    # Equal logits are common in bfloat16: ours is the first of them.
    first = torch.where(logits == best[:, None], torch.arange(VOCAB_SIZE, device=DEVICE), VOCAB_SIZE).amin(-1)
    assert torch.equal(ours_ids, first) and torch.equal(logits.gather(1, token_ids[:, None])[:, 0], best)


@SIZES
@DTYPES
def test_top_logprobs(num_rows: int, dtype: torch.dtype) -> None:
    logits = _logits(num_rows, dtype, 3.0)
    places = torch.arange(num_rows, device=DEVICE)
    token_ids = torch.randint(VOCAB_SIZE, (num_rows,), device=DEVICE)
    ids, logprobs, ranks = triton_sample.top_logprobs(logits, places, token_ids, 20)
    _, expected, expected_ranks = sample.top_logprobs(logits, places, token_ids, 20)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(ranks, expected_ranks)
    at = torch.log_softmax(logits.float(), -1).gather(1, ids.long())
    torch.testing.assert_close(at, logprobs, rtol=1e-5, atol=2e-5)
    assert all(len(set(row)) == 20 for row in ids[:, 1:].tolist())


@pytest.mark.parametrize(("top_k", "top_p"), [(VOCAB_SIZE, 1.0), (60, 0.9)])
def test_draws_of_many_seeds_follow_the_distribution(top_k: int, top_p: float) -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf, device=DEVICE)
    favourites = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))[:100].to(DEVICE)
    logits[0, favourites] = torch.randn(100, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    rounds = []
    for first_position in range(20):
        numbers = sample_cases.numbers(
            1000, 1000 * first_position, scale=sample.scale_of(1.0), top_k=top_k % VOCAB_SIZE, top_p=top_p
        )
        rows, tables = logits.expand(1000, -1).contiguous(), sample_cases.to(sample_cases.tables(1, 2), DEVICE)
        rounds.append(triton_sample.choose(rows, numbers.to(DEVICE), tables, adjusts=False)[0])
    sample_cases.assert_distribution(torch.cat(rounds), logits[0], top_k=min(top_k, 100), top_p=top_p)


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, top_p=0.95),
    SamplingParams(temperature=0.8, top_k=50, min_p=0.01, logprobs=5),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.5, logprobs=0),
    SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(300), 1.0)),
    SamplingParams(temperature=0.7, min_tokens=20, max_tokens=32, presence_penalty=1.0),
    SamplingParams(temperature=0.7, allowed_token_ids=range(0, VOCAB_SIZE, 2), frequency_penalty=0.1),
    SamplingParams(temperature=0.7, top_k=50),
]


def _joined(num_rows: int, num_generated: int = 3) -> list[Joined]:
    rng = np.random.default_rng(0)
    return [
        Joined(
            row=row,
            params=PARAMS[row % len(PARAMS)],
            seed=row,
            token_ids=rng.integers(0, VOCAB_SIZE, 100 + num_generated, dtype=np.int32),
            num_prompt_tokens=100,
            stop_token_ids=(3, 128001),
            bad_word_ids=((5, 6), (6,), (7, 8, 6), (9, 10, 11)) if row % len(PARAMS) >= 6 else (),
        )
        for row in range(num_rows)
    ]


def _batch(num_rows: int) -> DenseBatch:
    return equal_requests(num_rows, 105, 1, 16, is_decode=True)


@torch.inference_mode()
def test_rows_choose_as_their_twins_on_the_host() -> None:
    """Restrictions, bad words and penalties over several tokens: the device's tables say what the host's say."""
    num_rows = 3 * len(PARAMS)
    samplers = [
        Sampler(num_rows=num_rows, vocab_size=VOCAB_SIZE, device=device) for device in (DEVICE, torch.device("cpu"))
    ]
    # Few tokens are likely, so that sequences are completed; float32, so that both see the same.
    logits = _logits(num_rows, torch.float32)
    logits[:, :12] += 12.0
    for sampler in samplers:
        sampler.join(_joined(num_rows))
    for position in range(30):
        batch = equal_requests(num_rows, 105 + position, 1, 16, is_decode=True)
        ours, expected = (sampler.sample(batch, logits.to(sampler._device)).token_ids.cpu() for sampler in samplers)
        assert torch.equal(ours, expected)
        assert torch.equal(samplers[0]._state.tables.seen.cpu(), samplers[1]._state.tables.seen)


@pytest.fixture
def no_wait() -> Iterator[None]:
    """Whatever waits for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_nothing_waits_for_the_device(no_wait: None) -> None:
    """Joins and draws of every kind, also the first."""
    num_rows = 4 * len(PARAMS)
    sampler = Sampler(num_rows=num_rows, vocab_size=VOCAB_SIZE, device=DEVICE)
    logits, batch = _logits(num_rows, torch.bfloat16), _batch(num_rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        sampler.join(_joined(num_rows))
        drawn = sampler.sample(batch, logits)
        sampler.score(logits, drawn.token_ids, 3)


@torch.inference_mode()
def test_memory_is_that_which_was_counted() -> None:
    """A first request with penalties, biases or log probabilities takes no more than its results."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    num_rows, before = 256, torch.cuda.memory_allocated()
    sampler = Sampler(num_rows=num_rows, vocab_size=VOCAB_SIZE, device=DEVICE)
    counted = sampling_bytes(num_rows, VOCAB_SIZE, DEVICE)
    assert torch.cuda.memory_allocated() - before <= counted + 2**20
    logits = _logits(num_rows, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    sampler.join(_joined(num_rows))
    sampler.sample(_batch(num_rows), logits)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < 16 * 2**20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_end_their_request_alone(tmp_path: Path, value: float) -> None:
    check_that_spoilt_requests_end_alone(make_model("llama3", tmp_path / "made", seed=2), tmp_path, value, "cuda")
