"""Vectors of prompts: which hidden states are taken, part by part, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanoflow.batch import DenseBatch, PromptPooling
from nanoflow.engine.embeddings import embedding_params, finished_vector, read_dimensions
from nanoflow.executor.layout import lay_out
from nanoflow.executor.pooling import Pooler
from nanoflow.request import Pooling, Request, RequestError, SamplingParams
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.scheduler import Scheduler
from tests.graphs import batch_of

STATES = torch.arange(24.0).view(12, 2)


def batch(*poolings: PromptPooling) -> DenseBatch:
    """One request of 6 tokens in row 3, with these poolings."""
    return replace(batch_of([(0, 6)], 0, 5, seed=0), rows=np.array([3], np.int32), poolings=poolings)


def part(start: int, stop: int, *, is_first: bool, is_last: bool, num_pooled: int) -> PromptPooling:
    return PromptPooling(
        request_index=0, start=start, stop=stop, is_first=is_first, is_last=is_last, num_pooled=num_pooled
    )


@pytest.mark.parametrize("max_rows", [1, 2, 100])
def test_a_mean_in_parts_is_the_mean_of_all(max_rows: int) -> None:
    pooler = Pooler(max_rows)
    lost = part(0, 6, is_first=True, is_last=False, num_pooled=9)
    first = part(0, 6, is_first=True, is_last=False, num_pooled=10)
    last = part(0, 4, is_first=False, is_last=True, num_pooled=10)
    for one in (lost, first):
        given = batch(one)
        # An earlier tenant of the row, preempted halfway, leaves nothing behind.
        states = STATES + 100 if one is lost else STATES
        assert pooler.take(given, lay_out(given), states.__getitem__) == []
    given = batch(last)
    (vector,) = pooler.take(given, lay_out(given), lambda places: STATES[6 + places])
    assert torch.equal(vector, STATES[:10].mean(0))


def test_all_prompts_of_a_batch_are_asked_for_at_once() -> None:
    """A last token and a whole prompt; a row whose tenant left a sum behind begins anew."""
    pooler, asked = Pooler(100), []

    def hidden(places: np.ndarray) -> torch.Tensor:
        asked.append(places.tolist())
        return STATES[places]

    lost = batch(part(0, 6, is_first=True, is_last=False, num_pooled=9))
    assert pooler.take(lost, lay_out(lost), hidden) == []
    both = batch(
        part(3, 4, is_first=True, is_last=True, num_pooled=1), part(4, 6, is_first=True, is_last=True, num_pooled=2)
    )
    one, two = pooler.take(both, lay_out(both), hidden)
    assert torch.equal(one, STATES[3]) and torch.equal(two, STATES[4:6].mean(0))
    assert asked == [[0, 1, 2, 3, 4, 5], [3, 4, 5]]


@pytest.mark.parametrize("pooling", list(Pooling))
def test_which_tokens_of_a_prompt_count(pooling: Pooling) -> None:
    """In batches of four tokens: a prompt whose vector is asked for, and one without."""
    limits = SchedulerLimits(
        max_batch_tokens=4, max_num_seqs=2, max_model_len=64, num_pages=8, page_size=16, vocab_size=50
    )
    scheduler = Scheduler(limits=limits)
    for number, wanted in enumerate((pooling, None)):
        params = SamplingParams(pooling=wanted, max_tokens=1)
        scheduler.add(Request(request_id=number, prompt_token_ids=[1] * 6, params=params, seed=0, max_tokens=1))
    batches = [one for _ in range(3) if (one := scheduler.schedule()) is not None]
    poolings = [each for one in batches for each in one.poolings]
    found = [(each.start, each.stop, each.is_first, each.is_last, each.num_pooled) for each in poolings]
    whole = [(0, 4, True, False, 6), (0, 2, False, True, 6)]
    assert found == (whole if pooling is Pooling.MEAN else [(1, 2, True, True, 1)])


def test_what_is_made_of_a_vector() -> None:
    assert finished_vector([3.0, 4.0, 12.0], dimensions=2) == pytest.approx([0.6, 0.8])
    assert finished_vector([3.0, 4.0], normalize=False) == [3.0, 4.0]
    assert all(map(math.isfinite, finished_vector([0.0, 0.0])))
    assert [read_dimensions(given, 256) for given in (None, 1, 256, 2.0, np.int64(3))] == [None, 1, 256, 2, 3]
    for wrong in (0, 257, 1.5, "2", True):
        with pytest.raises(RequestError, match="dimensions must be ") as caught:
            read_dimensions(wrong, 256)
        assert caught.value.param == "dimensions"
    with pytest.raises(RequestError, match="pooling must be last or mean, got 'max'"):
        embedding_params("max")
