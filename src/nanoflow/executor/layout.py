"""The order of a batch's tokens in the tensors of an iteration.

A batch has its decodes first, the oldest request first. If the plan cuts the batch, decodes are dealt over the
nano-batches. Each nano-batch begins with decodes in proportion to its size (`graph/nanobatch.py`), long contexts and
short ones alike, so that it also has its share of the keys. Within a nano-batch long and short contexts are mixed: a
kernel whose programs share blocks of keys evenly would else give one program all short contexts, each of whose ends
takes time. Prompts follow; a chunk that crosses the end of a nano-batch is cut there. Without cuts the order stays.
Plain numpy; `inputs.py` copies the tokens to their places.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nanoflow.batch import DenseBatch, Int32, Int64
from nanoflow.graph.nanobatch import decodes_before, split

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The order of a batch of T tokens.

    Attributes:
        places: int32 [T], the place of each token of the batch.
        decode_places: int32 [decodes of the batch], places of the decodes; the first entries of `places`.
        num_decodes: D, places from the first on among which all decodes are.
        first_prefill: No place before it has a token of a prompt.
        chunk_requests: int32 [R], the request (index in the batch) of each part of a prompt; -1 for a gap.
        chunk_start: int32 [R + 1], first place of each part or gap, and the end; they follow each other.
        chunk_context: int32 [R], tokens in the request's cache after the part; 0 for a gap.
    """

    places: Int32
    decode_places: Int32
    num_decodes: int
    first_prefill: int
    chunk_requests: Int32
    chunk_start: Int32
    chunk_context: Int32


def lay_out(batch: DenseBatch, cuts: tuple[int, ...] = ()) -> Layout:
    """The layout of a batch under a plan with these cuts; cuts beyond the end of the batch are ignored."""
    num_tokens, num_decodes = batch.num_tokens, batch.num_decodes
    chunk_stop, context = batch.query_start[num_decodes + 1 :], batch.context_len[num_decodes:]
    decodes: list[Int32] = []
    prompts: list[Int32] = []
    # Request, place of its first token, tokens in its cache.
    chunks: list[tuple[int, int, int]] = []
    token = num_decodes
    for section in split(num_tokens, [cut for cut in cuts if cut < num_tokens]):
        first, last = (decodes_before(place, num_decodes, num_tokens) for place in (section.start, section.stop))
        prompt_place = section.start + last - first
        decodes.append(np.arange(section.start, prompt_place, dtype=np.int32))
        prompts.append(np.arange(prompt_place, section.stop, dtype=np.int32))
        if chunks and last > first:
            chunks.append((-1, section.start, 0))
        # The part of the prompts that fits, chunk by chunk.
        stop, place = token + section.stop - prompt_place, prompt_place
        while token < stop:
            chunk = int(np.searchsorted(chunk_stop, token, side="right"))
            part_stop = min(int(chunk_stop[chunk]), stop)
            chunks.append((num_decodes + chunk, place, int(context[chunk]) - (int(chunk_stop[chunk]) - part_stop)))
            place, token = place + part_stop - token, part_stop
    requests, starts, contexts = (np.array(column, np.int32) for column in _columns(chunks))
    decode_places = _dealt(batch.context_len[:num_decodes], decodes)
    return Layout(
        places=np.concatenate((decode_places, *prompts)),
        decode_places=decode_places,
        num_decodes=int(decode_places.max()) + 1 if len(decode_places) else 0,
        first_prefill=int(starts[0]) if len(starts) else num_tokens,
        chunk_requests=requests,
        chunk_start=np.append(starts, np.int32(num_tokens)),
        chunk_context=contexts,
    )


def _dealt(contexts: Int32, sections: list[Int32]) -> Int32:
    """The place of each decode among the decodes of its nano-batch.

    Decodes are dealt from the longest context to the shortest; a nano-batch gets one whenever its share of those dealt
    so far is due. So the keys of two nano-batches differ from their shares by at most the difference of the longest and
    the shortest context. Within a nano-batch successive decodes get places far apart.
    """
    places = np.concatenate(sections)
    if sum(len(section) > 0 for section in sections) < 2:
        return places
    due = np.concatenate([(_spread(len(section)) + 0.5) / max(len(section), 1) for section in sections])
    dealt = np.empty_like(places)
    dealt[np.argsort(-contexts, kind="stable")] = places[np.argsort(due, kind="stable")]
    return dealt


@lru_cache(maxsize=256)
def _spread(count: int) -> Int64:
    """The numbers below `count` in an order that mixes small and large ones everywhere: ranks of i / phi mod 1."""
    ranks = np.empty(count, np.int64)
    ranks[np.argsort(np.arange(count) * _GOLDEN % 1.0)] = np.arange(count)
    return ranks


def _columns(chunks: list[tuple[int, int, int]]) -> list[list[int]]:
    return [list(column) for column in itertools.zip_longest(*chunks)] if chunks else [[], [], []]
