"""Vectors of prompts: which hidden states are taken, part by part, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanoflow.batch import DenseBatch, PromptPooling
from nanoflow.engine.embeddings import embedding_params, finished_vector
from nanoflow.executor.layout import lay_out
from nanoflow.executor.pooling import Pooler
from nanoflow.request import Pooling, RequestError
from tests.graphs import batch_of

STATES = torch.arange(24.0).view(12, 2)


def batch(*poolings: PromptPooling) -> DenseBatch:
    """One request of 6 tokens in row 3, with these poolings."""
    return replace(batch_of([(0, 6)], 0, 5, seed=0), rows=np.array([3], np.int32), poolings=poolings)


def part(start: int, stop: int, *, is_first: bool, is_last: bool, kind: Pooling, num_pooled: int) -> PromptPooling:
    return PromptPooling(
        request_index=0, start=start, stop=stop, is_first=is_first, is_last=is_last, kind=kind, num_pooled=num_pooled
    )


@pytest.mark.parametrize("max_rows", [1, 2, 100])
def test_a_mean_in_parts_is_the_mean_of_all(max_rows: int) -> None:
    pooler = Pooler(max_rows)
    lost = part(0, 6, is_first=True, is_last=False, kind=Pooling.MEAN, num_pooled=9)
    first = part(0, 6, is_first=True, is_last=False, kind=Pooling.MEAN, num_pooled=10)
    last = part(0, 4, is_first=False, is_last=True, kind=Pooling.MEAN, num_pooled=10)
    for one in (lost, first):
        given = batch(one)
        # An earlier tenant of the row, preempted halfway, leaves nothing behind.
        states = STATES + 100 if one is lost else STATES
        assert pooler.take(given, lay_out(given), states.__getitem__) == []
    given = batch(last)
    (vector,) = pooler.take(given, lay_out(given), lambda places: STATES[6 + places])
    assert torch.equal(vector, STATES[:10].mean(0))


def test_the_last_token_is_the_last_of_the_last_part() -> None:
    pooler, asked = Pooler(100), []

    def hidden(places: np.ndarray) -> torch.Tensor:
        asked.extend(places.tolist())
        return STATES[places]

    first = batch(part(0, 6, is_first=True, is_last=False, kind=Pooling.LAST, num_pooled=1))
    last = batch(part(0, 4, is_first=False, is_last=True, kind=Pooling.LAST, num_pooled=1))
    assert pooler.take(first, lay_out(first), hidden) == []
    (vector,) = pooler.take(last, lay_out(last), hidden)
    assert torch.equal(vector, STATES[3]) and asked == [3]


def test_what_is_made_of_a_vector() -> None:
    assert finished_vector([3.0, 4.0, 12.0], dimensions=2) == pytest.approx([0.6, 0.8])
    assert finished_vector([3.0, 4.0], normalize=False) == [3.0, 4.0]
    assert all(map(math.isfinite, finished_vector([0.0, 0.0])))
    with pytest.raises(RequestError, match="dimensions must be from 1 to 2, got 3"):
        finished_vector([3.0, 4.0], dimensions=3)
    with pytest.raises(RequestError, match="pooling must be last or mean, got 'max'"):
        embedding_params("max")
