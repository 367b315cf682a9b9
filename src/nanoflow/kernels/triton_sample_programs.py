"""Programs that choose tokens from logits, one for each row; they stream the row's logits instead of sorting them.

A row is read once for its largest logit and for the weight of each block of the vocabulary. With a filter (top_k,
top_p), which is a threshold on the logit, it is usually read twice (`triton_sample_filters.py`). The draw then selects
a block by its weight, and reads that block again for the token.

Weights are 2 ** ((logit - largest) * scale) in float32. Groups of eight are summed in float32, everything else in
float64.
Shape legend: S rows, V vocabulary, R rows of the tables, B blocks, G groups of a block, I logits of a group.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels.triton_sample_filters import filtered
from nanoflow.kernels.triton_sample_rows import (
    FIRST_FREE_STOP,
    FREQUENCY,
    HAS_PENALTIES,
    IS_RESTRICTED,
    LOG_MIN_P,
    MASK,
    MAX_COUNT,
    NUM_BIASES,
    NUM_EDITS,
    NUM_FIELDS,
    POSITION,
    PRESENCE,
    REPETITION,
    ROW,
    SCALE,
    SEED,
    TOP_K,
    TOP_P,
    adjusted,
    columns_of,
    first_column,
    read,
    uniform_of,
    weights_of,
)
from nanoflow.kernels.triton_sample_search import ALL, LOWEST


@triton.jit
def largest_program(
    logits: tl.tensor,
    token_ids: tl.tensor,
    best: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> None:
    """Largest logit of each row of logits [S, V], and its token, the lowest of equals: best [S] and token_ids [S]."""
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * VOCAB
    blocks = tl.arange(0, NUM_BLOCKS)
    largest = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = read(row, block * BLOCK, VOCAB, BLOCK, INNER)
        largest = tl.where(blocks == block, tl.max(tl.max(exact, axis=1), axis=0), largest)
    peak = tl.max(largest, axis=0)
    block = tl.min(tl.where(largest == peak, blocks, NUM_BLOCKS - 1), axis=0)
    exact = read(row, block * BLOCK, VOCAB, BLOCK, INNER)
    tl.store(best + place, peak)
    tl.store(token_ids + place, first_column(exact == peak, block * BLOCK, VOCAB, BLOCK, INNER).to(tl.int64))


@triton.jit(do_not_specialize=["edit_stride"], do_not_specialize_on_alignment=["numbers", "floats", "seeds"])
def choose_program(
    logits: tl.tensor,
    numbers: tl.tensor,
    floats: tl.tensor,
    seeds: tl.tensor,
    seen: tl.tensor,
    edit_ids: tl.tensor,
    edit_values: tl.tensor,
    masks: tl.tensor,
    edit_stride: int,
    token_ids: tl.tensor,
    best: tl.tensor,
    scratch: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GRID_BITS: tl.constexpr,
    ADJUSTS: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """Largest adjusted logit and chosen token of each row: best [S] and token_ids [S] of logits [S, V].

    numbers, floats and seeds are three views of `sample.NUMBERS` [S]; seen [R, V] and edits [R, edit_stride] are the
    tables, and masks [M, ceil(V / 32)] are of this launch. scratch [S, ROOM] is for logits that a search lists.
    GRID_BITS low bits are zero in a float32 converted from the logits' dtype.
    """
    # Blocks of a row that are read ahead, plus one: with few rows a pass is bound by memory latency. Without read-ahead
    # if logits are adjusted: Triton 3.6 mixes up blocks if the loop that reads them contains a loop over edits.
    STAGES: tl.constexpr = 1 if ADJUSTS else 4
    place = tl.program_id(0).to(tl.int64)
    numbers += place * NUM_FIELDS
    floats += place * NUM_FIELDS
    table_row = tl.load(numbers + ROW).to(tl.int64)
    seen += table_row * VOCAB
    is_held = tl.load(numbers + POSITION) < tl.load(numbers + FIRST_FREE_STOP)
    num_edits = tl.where(is_held | (tl.load(numbers + NUM_BIASES) > 0), tl.load(numbers + NUM_EDITS), 0)
    has_penalties = tl.load(numbers + HAS_PENALTIES) > 0
    mask = tl.load(numbers + MASK).to(tl.int64)
    row = (
        logits + place * VOCAB,
        seen,
        edit_ids + table_row * edit_stride,
        edit_values + table_row * edit_stride,
        num_edits,
        is_held,
        has_penalties | (tl.load(numbers + IS_RESTRICTED) > 0),
        (tl.load(floats + REPETITION), tl.load(floats + PRESENCE), tl.load(floats + FREQUENCY)),
        ADJUSTS,
        scratch + place * ROOM,
        masks + (mask - 1) * tl.cdiv(VOCAB, 32),
        mask > 0,
    )
    scale, top_k, log_min_p = tl.load(floats + SCALE), tl.load(numbers + TOP_K), tl.load(floats + LOG_MIN_P)
    has_top_p, has_min_p = tl.load(floats + TOP_P) < 1, log_min_p > float("-inf")
    # A search makes its own first pass, in which min_p excludes no logit.
    is_searched = (scale > 0) & ((top_k > 0) | (has_top_p & (has_min_p == 0)))
    blocks = tl.arange(0, NUM_BLOCKS)
    largest = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    masses, equals = tl.zeros([NUM_BLOCKS], tl.float64), tl.zeros([NUM_BLOCKS], tl.int32)
    if is_searched == 0:
        largest, masses = _blocks_of(row, scale, VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS)
    peak = tl.max(largest, axis=0)
    threshold, num_equal = scale * 0 + LOWEST, top_k * 0 + ALL
    if is_searched | ((scale > 0) & has_min_p & (tl.abs(peak) < float("inf"))):
        threshold, num_equal, masses, equals, peak = filtered(
            row, floats, top_k, log_min_p, masses, peak, scale, VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS, GRID_BITS, ROOM
        )
    tl.store(best + place, peak)
    if (scale > 0) & (tl.abs(peak) < float("inf")):
        uniform = uniform_of(tl.load(seeds + place * (NUM_FIELDS // 2) + SEED // 2), tl.load(numbers + POSITION))
        token_id = _drawn(
            row, uniform, threshold, num_equal, masses, equals, peak, scale, log_min_p, VOCAB, BLOCK, INNER, NUM_BLOCKS
        )
    else:
        block = tl.min(tl.where(largest == peak, blocks, NUM_BLOCKS - 1), axis=0)
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        token_id = first_column(exact == peak, block * BLOCK, VOCAB, BLOCK, INNER)
    tl.store(token_ids + place, token_id.to(tl.int64))
    if has_penalties:
        count = tl.load(seen + token_id)
        tl.store(seen + token_id, tl.where((count & MAX_COUNT) < MAX_COUNT, count + 1, count).to(tl.int16))


@triton.jit
def _blocks_of(
    row: tl.tuple,
    scale: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest logit of each block, and the block's weight relative to the row's largest if the row is drawn; [B]."""
    blocks = tl.arange(0, NUM_BLOCKS)
    largest = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    masses = tl.zeros([NUM_BLOCKS], tl.float64)
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=STAGES):
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        peak = tl.max(tl.max(exact, axis=1), axis=0)
        largest = tl.where(blocks == block, peak, largest)
        if scale > 0:
            # Relative to a finite number: a block may have no token that can be drawn.
            peak = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
            mass = tl.sum(tl.sum(tl.exp2((exact - peak) * scale), axis=1).to(tl.float64), axis=0)
            masses = tl.where(blocks == block, mass, masses)
    rises = tl.where(largest > float("-inf"), (largest - tl.max(largest, axis=0)) * scale, float("-inf"))
    return largest, masses * tl.exp2(rises).to(tl.float64)


@triton.jit
def _drawn(
    row: tl.tuple,
    uniform: tl.tensor,
    threshold: tl.tensor,
    num_equal: tl.tensor,
    masses: tl.tensor,
    equals: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> tl.tensor:
    """The first token whose cumulative weight exceeds uniform times the total; never one of weight 0."""
    blocks, groups = tl.arange(0, NUM_BLOCKS), tl.arange(0, BLOCK // INNER)
    block, part = _place(blocks, masses, uniform * tl.sum(masses, axis=0))
    exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
    weights = weights_of(exact, peak, scale, log_min_p)
    is_equal = (exact == threshold).to(tl.int32)
    of_group = tl.sum(is_equal, axis=1)
    before = tl.sum(tl.where(blocks < block, equals, 0), axis=0) + tl.cumsum(of_group, axis=0) - of_group
    rank = before[:, None] + tl.cumsum(is_equal, axis=1) - is_equal
    weights = tl.where((exact > threshold) | ((is_equal > 0) & (rank < num_equal)), weights, 0.0)
    of_group = tl.sum(weights, axis=1).to(tl.float64)
    # The sum is computed again, as the block's weight may differ in its last bits.
    group, part = _place(groups, of_group, part * tl.sum(of_group, axis=0))
    inner = tl.sum(tl.where(groups[:, None] == group, weights, 0.0), axis=0).to(tl.float64)
    column, _ = _place(tl.arange(0, INNER), inner, part * tl.sum(inner, axis=0))
    return block * BLOCK + group * INNER + column


@triton.jit
def _place(places: tl.tensor, weights: tl.tensor, target: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first index whose cumulative weight exceeds the target, and the part of its weight below the target.

    Sums are float64. If rounding puts the target at the total, it is the last index with a weight.
    """
    sums = tl.cumsum(weights, axis=0)
    last = tl.max(tl.where(weights > 0, places, 0), axis=0)
    place = tl.min(tl.where((sums > target) & (weights > 0), places, last), axis=0)
    weight = tl.sum(tl.where(places == place, weights, 0.0), axis=0)
    before = tl.sum(tl.where(places == place, sums - weights, 0.0), axis=0)
    part = (target - before) / tl.where(weight > 0, weight, 1.0)
    return place, tl.minimum(tl.maximum(part, 0.0), 1.0)


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=["places", "token_ids"])
def top_logprobs_program(
    logits: tl.tensor,
    places: tl.tensor,
    token_ids: tl.tensor,
    top_ids: tl.tensor,
    logprobs: tl.tensor,
    ranks: tl.tensor,
    num_top: int,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> None:
    """`sample.top_logprobs`, one program for each position: top_ids and logprobs [N, 1 + num_top], ranks [N].

    The most probable tokens are taken one by one from the block with the largest remaining logit, which is then read
    again.
    """
    place = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(places + place) * VOCAB
    token_id = tl.load(token_ids + place)
    chosen = tl.load(row + token_id).to(tl.float32)
    blocks = tl.arange(0, NUM_BLOCKS)
    largest = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    sums = tl.zeros([NUM_BLOCKS], tl.float32)
    num_above = tl.zeros([BLOCK // INNER], tl.int32)
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=3):
        exact = read(row, block * BLOCK, VOCAB, BLOCK, INNER)
        num_above += tl.sum((exact > chosen).to(tl.int32), axis=1)
        peak = tl.max(tl.max(exact, axis=1), axis=0)
        largest = tl.where(blocks == block, peak, largest)
        total = tl.sum(tl.sum(tl.exp(exact - tl.where(peak > float("-inf"), peak, 0.0)), axis=1), axis=0)
        sums = tl.where(blocks == block, total, sums)
    peak = tl.max(largest, axis=0)
    log_sum = tl.log(tl.sum(tl.where(largest > float("-inf"), sums * tl.exp(largest - peak), 0.0), axis=0))
    at = place * (1 + num_top)
    tl.store(top_ids + at, token_id.to(tl.int32))
    tl.store(logprobs + at, chosen - peak - log_sum)
    tl.store(ranks + place, tl.sum(num_above, axis=0) + 1)
    # For each block, the logit taken last and its token; only what comes later in the order remains.
    last_logits = tl.full([NUM_BLOCKS], float("inf"), tl.float32)
    last_ids = tl.full([NUM_BLOCKS], -1, tl.int32)
    for rank in range(1, num_top + 1):
        best = tl.max(largest, axis=0)
        block = tl.min(tl.where(largest == best, blocks, NUM_BLOCKS - 1), axis=0)
        is_block = blocks == block
        last = tl.max(tl.where(is_block, last_logits, float("-inf")), axis=0)
        last_id = tl.max(tl.where(is_block, last_ids, -1), axis=0)
        exact = read(row, block * BLOCK, VOCAB, BLOCK, INNER)
        columns = columns_of(block * BLOCK, BLOCK, INNER)
        is_left = ((exact < last) | ((exact == last) & (columns > last_id))) & (columns < VOCAB)
        best_id = first_column(is_left & (exact == best), block * BLOCK, VOCAB, BLOCK, INNER)
        is_left = is_left & ((exact < best) | ((exact == best) & (columns > best_id)))
        next_best = tl.max(tl.max(tl.where(is_left, exact, float("-inf")), axis=1), axis=0)
        largest = tl.where(is_block, next_best, largest)
        last_logits = tl.where(is_block, best, last_logits)
        last_ids = tl.where(is_block, best_id, last_ids)
        tl.store(top_ids + at + rank, best_id)
        tl.store(logprobs + at + rank, best - peak - log_sum)
