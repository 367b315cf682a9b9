"""Where the tokens of a batch stand: nothing moves without cuts, and with cuts every nano-batch gets its part."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.batch import DenseBatch
from nanoflow.executor.layout import lay_out
from nanoflow.graph.nanobatch import decodes_before, split
from tests.graphs import batch_of


@st.composite
def batches(draw: st.DrawFn) -> DenseBatch:
    decodes = [(draw(st.integers(0, 40)), 1) for _ in range(draw(st.integers(0, 30)))]
    chunks = [(draw(st.integers(0, 40)), draw(st.integers(2, 30))) for _ in range(draw(st.integers(0, 6)))]
    requests = (*decodes, *chunks) or [(0, 3)]
    return batch_of(list(requests), len(decodes), 10, seed=draw(st.integers(0, 9)))


@given(batch=batches())
def test_nothing_moves_without_cuts(batch: DenseBatch) -> None:
    layout = lay_out(batch, (batch.num_tokens, batch.num_tokens + 5))
    assert layout.places.tolist() == list(range(batch.num_tokens))
    assert layout.num_decodes == layout.first_prefill == batch.num_decodes
    assert layout.chunk_requests.tolist() == list(range(batch.num_decodes, batch.num_requests))
    assert layout.chunk_start.tolist() == batch.query_start[batch.num_decodes :].tolist()
    assert layout.chunk_context.tolist() == batch.context_len[batch.num_decodes :].tolist()


@given(batch=batches(), data=st.data())
def test_every_nano_batch_begins_with_its_part_of_the_decodes(batch: DenseBatch, data: st.DataObject) -> None:
    num_tokens = batch.num_tokens
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, num_tokens + 8), max_size=4))))
    layout = lay_out(batch, cuts)
    # 1. Every token has a place of its own.
    assert sorted(layout.places.tolist()) == list(range(num_tokens))
    assert layout.decode_places.tolist() == layout.places[: batch.num_decodes].tolist()
    # 2. Decodes stand first in each section.
    is_decode = np.zeros(num_tokens, bool)
    is_decode[layout.decode_places] = True
    for section in split(num_tokens, [cut for cut in cuts if cut < num_tokens]):
        first, last = (decodes_before(place, batch.num_decodes, num_tokens) for place in (section.start, section.stop))
        expected = [place < last - first for place in range(section.num_tokens)]
        assert is_decode[section.start : section.stop].tolist() == expected
    assert not is_decode[layout.num_decodes :].any()
    # 3. Parts of prompts, with gaps where decodes stand, keep the position of every token.
    position_at = np.empty(num_tokens, np.int64)
    position_at[layout.places] = batch.positions
    request_at = np.empty(num_tokens, np.int64)
    request_at[layout.places] = np.repeat(np.arange(batch.num_requests), np.diff(batch.query_start))
    parts = zip(layout.chunk_requests, layout.chunk_context, layout.chunk_start, layout.chunk_start[1:], strict=False)
    seen = np.zeros(num_tokens, bool)
    for request, context, start, stop in parts:
        assert start < stop
        seen[start:stop] = request >= 0
        if request < 0:
            assert context == 0
        else:
            assert not is_decode[start:stop].any() and (request_at[start:stop] == request).all()
            assert position_at[start:stop].tolist() == list(range(context - (stop - start), context))
    assert (seen == ~is_decode).all()
    assert layout.first_prefill == (int(np.argmin(is_decode)) if not is_decode.all() else num_tokens)


@given(st.data())
def test_every_nano_batch_gets_its_part_of_the_keys(data: st.DataObject) -> None:
    """Requests come oldest first, so their contexts are anything but dealt."""
    contexts = sorted(data.draw(st.lists(st.integers(0, 5000), min_size=2, max_size=60)), reverse=True)
    batch = batch_of([(context, 1) for context in contexts], len(contexts), 10, seed=0)
    cut = data.draw(st.integers(1, len(contexts) - 1))
    layout = lay_out(batch, (cut,))
    first = batch.context_len[layout.decode_places < cut].sum()
    even = batch.context_len.sum() * cut / len(contexts)
    assert abs(first - even) <= max(contexts) - min(contexts)


def test_long_and_short_contexts_are_mixed_all_along_a_nano_batch() -> None:
    """Any sixteenth of a nano-batch's decodes has about a sixteenth of its keys."""
    contexts = np.random.default_rng(0).exponential(500, 640).astype(int)
    batch = batch_of([(int(context), 1) for context in contexts], len(contexts), 10, seed=0)
    layout = lay_out(batch, (320,))
    at_place = np.empty(640)
    at_place[layout.decode_places] = batch.context_len
    for half in (at_place[:320], at_place[320:]):
        parts = half.reshape(16, 20).sum(axis=1) / half.sum() * 16
        assert parts.min() > 0.7 and parts.max() < 1.3
