"""What counts of a draft, against a twin that says it token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.batch import DenseBatch
from nanoflow.scheduler.verify import counting_draws
from tests.graphs import batch_of, drawing


def drafted_batch(lengths: list[int], num_draws: list[int], token_ids: list[int]) -> DenseBatch:
    """Parts of prompts, each of which draws behind so many of its last tokens."""
    batch = batch_of([(3, length) for length in lengths], 0, 9, seed=0)
    batch = dataclasses.replace(batch, token_ids=np.array(token_ids, np.int32))
    return drawing(batch, np.repeat(np.arange(len(lengths)), num_draws).tolist())


@given(st.data())
def test_draws_count_as_long_as_guesses_are_right(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    num_draws = [data.draw(st.integers(0, length)) for length in lengths]
    num_tokens, num_drawn = sum(lengths), sum(num_draws)
    ids = st.integers(0, 1)
    batch = drafted_batch(lengths, num_draws, data.draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens)))
    drawn = data.draw(st.lists(ids, min_size=num_drawn, max_size=num_drawn))
    is_last = data.draw(st.lists(st.sampled_from([False, False, True]), min_size=num_drawn, max_size=num_drawn))
    counting, logit_tokens, positions = [], [], []
    for index, count in enumerate(num_draws):
        stop, counts = sum(lengths[: index + 1]), True
        for before in range(count):
            place = stop - count + before
            counting.append(counts)
            logit_tokens.append(place)
            positions.append(int(batch.positions[place]) + 1)
            at = len(counting) - 1
            is_right = before + 1 < count and drawn[at] == batch.token_ids[place + 1]
            counts = counts and is_right and not is_last[at]
    assert batch.logit_tokens.tolist() == logit_tokens
    assert batch.drawn_positions.tolist() == positions
    assert counting_draws(batch, np.array(drawn, np.int32), np.array(is_last, np.bool_)).tolist() == counting
