"""The sampler cuts large batches into parts: what comes out does not depend on where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanoflow.batch import DenseBatch, Joined
from nanoflow.executor import sampler as module
from nanoflow.executor.sampler import Drawn, Sampler
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


def _sample(num_elements: int, monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    monkeypatch.setattr(module, "_MAX_ELEMENTS", num_elements)
    batch, generator = _batch(), torch.Generator().manual_seed(0)
    sampler = Sampler(num_rows=16, vocab_size=VOCAB_SIZE, device=CPU)
    for place, params in enumerate(PARAMS):
        sampler.join(
            Joined(
                row=int(batch.rows[place]),
                params=params,
                seed=place,
                token_ids=np.array([1, 2, 3], np.int32),
                num_prompt_tokens=2,
                stop_token_ids=(4,),
            )
        )
    return [sampler.sample(batch, torch.randn(len(PARAMS), VOCAB_SIZE, generator=generator) * 3) for _ in range(4)]


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_parts_do_not_change_what_is_drawn(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _sample(1 << 20, monkeypatch)
    in_parts = _sample(num_rows * VOCAB_SIZE, monkeypatch)
    for one, other in zip(whole, in_parts, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.best, other.best)
        assert one.logprob_places == other.logprob_places == [(0, 3), (2, 1)]
        for field, other_field in zip(one.logprobs, other.logprobs, strict=True):
            torch.testing.assert_close(field, other_field)


def test_rows_that_take_the_largest_logit_stay_together() -> None:
    sampler, batch = Sampler(num_rows=16, vocab_size=1 << 24, device=CPU), _batch()
    assert sampler._parts(batch.rows, batch.context_len) == [slice(0, len(PARAMS))]
    sampler._temperature[batch.rows[2]] = 1.0
    assert sampler._parts(batch.rows, batch.context_len)[0] == slice(0, 2)
