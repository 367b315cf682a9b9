"""The sampler's state of each row: what a request brings, and that nothing of an earlier one is left."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.batch import DenseBatch, Joined
from nanoflow.executor.sampler import Drawn, Sampler, sampling_bytes
from nanoflow.executor.sampling_state import SamplingState
from nanoflow.kernels.dispatch import SampleKernels
from nanoflow.kernels.sample import IN_PROMPT, MAX_COUNT
from nanoflow.request import SamplingParams
from tests.graphs import batch_of

VOCAB_SIZE = 50
CPU = torch.device("cpu")
PARAMS = (
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=1.2, top_k=7, top_p=0.8, logprobs=1),
    SamplingParams(temperature=0.7, min_p=0.1, logit_bias={3: 4.0}),
    SamplingParams(temperature=0.0, min_tokens=9),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.0),
)


def _batch() -> DenseBatch:
    return batch_of([(place + 2, 1) for place in range(len(PARAMS))], len(PARAMS), VOCAB_SIZE, seed=0)


def _joined(row: int, params: SamplingParams, seed: int = 0, **options: Any) -> Joined:
    tokens = {"token_ids": np.array([1, 2, 3], np.int32), "num_prompt_tokens": 2, "stop_token_ids": (4,)}
    return Joined(row=row, params=params, seed=seed, **{**tokens, **options})


def _logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(PARAMS), VOCAB_SIZE, generator=generator) * 3 for _ in range(4)]


def _sample(sampler: Sampler) -> list[Drawn]:
    batch = _batch()
    sampler.join([_joined(int(batch.rows[place]), params, place) for place, params in enumerate(PARAMS)])
    return [sampler.sample(batch, logits) for logits in _logits()]


def test_a_row_keeps_nothing_of_an_earlier_request() -> None:
    fresh, used = (Sampler(num_rows=16, vocab_size=VOCAB_SIZE, device=CPU) for _ in range(2))
    everything = SamplingParams(
        temperature=2.0, top_k=3, top_p=0.5, min_p=0.3, repetition_penalty=2.0, logit_bias={7: 50.0}, min_tokens=9
    )
    used.join([_joined(row, everything, token_ids=np.arange(40, dtype=np.int32)) for row in range(16)])
    used.sample(_batch(), _logits()[0])
    for one, other in zip(_sample(fresh), _sample(used), strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.best, other.best)
        assert one.logprob_places == other.logprob_places == [(0, 3), (2, 1)]
        assert all(torch.equal(*fields) for fields in zip(one.logprobs, other.logprobs, strict=True))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_log_probabilities_are_the_models_own(kernels: str) -> None:
    """Of its logits as they are, whatever biases, penalties, filters and held-back stop tokens make of the draw."""
    sampler = Sampler(num_rows=4, vocab_size=VOCAB_SIZE, device=CPU)
    if kernels == "triton":
        sampler._kernels = interpreted_kernels()
    adjusted = SamplingParams(
        temperature=1.7,
        top_k=9,
        logit_bias={5: 30.0, 6: -30.0},
        repetition_penalty=1.8,
        presence_penalty=1.5,
        frequency_penalty=1.0,
        min_tokens=9,
        logprobs=20,
    )
    batch = batch_of([(3, 1), (3, 1)], 2, VOCAB_SIZE, seed=0)
    batch = replace(batch, rows=np.array([3, 1], np.int32))
    sampler.join([_joined(3, adjusted), _joined(1, replace(adjusted, logprobs=2))])
    logits = _logits()[0][:2].contiguous()
    expected = logits.log_softmax(-1)
    drawn = sampler.sample(batch, logits)
    assert drawn.token_ids.tolist() == [5, 5], "the bias decides the draw"
    assert drawn.logprob_places == [(0, 20), (1, 2)]
    ids, logprobs, ranks = drawn.logprobs
    torch.testing.assert_close(logprobs, expected.gather(-1, ids.long()))
    torch.testing.assert_close(logprobs[:, 1:], expected.topk(20)[0])
    assert ranks.tolist() == [int((row > row[5]).sum()) + 1 for row in expected]


def interpreted_kernels() -> SampleKernels:
    """Those of a GPU, by Triton's interpreter."""
    pytest.importorskip("triton")
    import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
    from nanoflow.kernels import triton_sample as fast

    blocks = fast.RowBlocks(block=32, num_warps=4, room=32)
    return SampleKernels(
        largest=partial(fast.largest, blocks=blocks),
        choose=partial(fast.choose, blocks=blocks),
        top_logprobs=partial(fast.top_logprobs, blocks=blocks),
        workspace_bytes=fast.workspace_bytes,
    )


def test_seen_tokens_after_a_preemption() -> None:
    state = SamplingState(num_rows=4, vocab_size=VOCAB_SIZE, device=CPU)
    params = SamplingParams(frequency_penalty=1.0)
    state.join([_joined(2, params, token_ids=np.full(9, 8, np.int32), num_prompt_tokens=5), _joined(0, params)])
    tokens = np.array([5, 5, 9, 9, 9, 5, 30], np.int32)
    state.join([_joined(2, params, token_ids=tokens, num_prompt_tokens=3), _joined(1, SamplingParams())])
    seen = {int(token): int(state.tables.seen[2, token]) for token in state.tables.seen[2].nonzero()}
    assert seen == {5: IN_PROMPT + 1, 9: IN_PROMPT + 2, 30: 1}
    assert state.tables.seen[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert not state.tables.seen[[1, 3]].any()


def test_edits_are_in_order_and_have_room() -> None:
    state = SamplingState(num_rows=4, vocab_size=2000, device=CPU)
    few = SamplingParams(logit_bias={9: 1.0, 3: -2.0}, min_tokens=5)
    many = SamplingParams(min_tokens=1)
    state.join([_joined(1, few, stop_token_ids=(7, 3, -1, 2000))])
    state.join([_joined(2, many, stop_token_ids=tuple(range(1500)))])
    (one, other) = state.numbers(np.array([1, 2], np.int32), np.array([4, 4], np.int32))
    assert (one["num_edits"], one["num_biases"], one["first_free_stop"]) == (4, 2, 7)
    assert state.tables.edit_ids[1, :4].tolist() == [3, 3, 7, 9]
    assert state.tables.edit_values[1, :4].tolist() == [-2.0, -torch.inf, -torch.inf, 1.0]
    assert other["num_edits"] == 1500 and state.tables.edit_ids[2, :1500].tolist() == list(range(1500))


def test_numbers_are_what_the_request_says_as_far_as_kernels_can_tell() -> None:
    state = SamplingState(num_rows=3, vocab_size=VOCAB_SIZE, device=CPU)
    state.join(
        [
            _joined(0, SamplingParams(top_k=VOCAB_SIZE, top_p=1e-60), seed=2**64 - 3),
            _joined(1, SamplingParams(top_k=VOCAB_SIZE - 1), seed=-3),
            _joined(2, SamplingParams(min_tokens=2), num_prompt_tokens=7),
        ]
    )
    one, other, third = state.numbers(np.arange(3, dtype=np.int32), np.zeros(3, np.int32))
    assert one["seed"] == other["seed"] == 2**64 - 3
    assert (one["top_k"], other["top_k"]) == (0, VOCAB_SIZE - 1), "one that keeps all costs nothing"
    assert 0 < one["top_p"] < 1e-30, "the most probable token stays"
    # The tokens at places 7 and 8 are the two that may not end it.
    assert third["first_free_stop"] == 9


def test_a_row_with_a_long_past_counts_to_the_most_that_fits() -> None:
    state = SamplingState(num_rows=1, vocab_size=VOCAB_SIZE, device=CPU)
    tokens = np.array([5, *[9] * (MAX_COUNT + 10)], np.int32)
    state.join([_joined(0, SamplingParams(frequency_penalty=1.0), token_ids=tokens, num_prompt_tokens=1)])
    assert (int(state.tables.seen[0, 5]), int(state.tables.seen[0, 9])) == (IN_PROMPT, MAX_COUNT)


def test_stop_tokens_are_only_kept_for_those_who_hold_them_back() -> None:
    state = SamplingState(num_rows=1, vocab_size=VOCAB_SIZE, device=CPU)
    state.join([_joined(0, SamplingParams())])
    assert state.numbers(np.zeros(1, np.int32), np.zeros(1, np.int32))["num_edits"] == 0


@pytest.mark.parametrize(("num_rows", "most_mib"), [(1024, 700), (4096, 1600)])
def test_what_sampling_takes_at_a_large_vocabulary(num_rows: int, most_mib: int) -> None:
    assert 2 * num_rows * 128256 < sampling_bytes(num_rows, 128256, CPU) < most_mib * 2**20


def test_draws_behind_drafts_take_work_space_too() -> None:
    one, two, six = (sampling_bytes(1, 1000, CPU, num_logits) for num_logits in (None, 2, 6))
    assert six - one == 5 * (two - one) > 0
