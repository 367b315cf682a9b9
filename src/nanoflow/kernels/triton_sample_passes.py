"""Passes over a row with a filter: guess probes from a sample, measure at probes, list logits, and sum what is kept.

Shape legend: V vocabulary, B blocks, G groups of a block, I logits of a group.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels.triton_sample_rows import adjusted, key_of, on_grid, weights_of


@triton.jit
def guessed(
    logits: tl.tensor,
    fraction: tl.tensor,
    scale: tl.tensor,
    IS_COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Probes for a first pass, from logits sampled evenly over the row (as many as a block has), before adjustments.

    Returns:
        A logit near the largest; one that about 0.4 ROOM tokens reach; and three in ascending or descending order. Of
            these the middle one has about the given fraction of the total (of tokens, or of weight) at or above it, and
            the outer ones differ from it by 2.5 standard deviations of the guess.
    """
    GROUPS: tl.constexpr = BLOCK // INNER
    STRIDE: tl.constexpr = max(1, VOCAB // INNER // GROUPS) * INNER
    columns = tl.arange(0, GROUPS)[:, None] * STRIDE + tl.arange(0, INNER)[None, :]
    exact = tl.load(logits + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    exact = tl.where(tl.abs(exact) < float("inf"), exact, float("-inf"))
    peak = tl.max(tl.max(exact, axis=1), axis=0)
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    ones = tl.where(exact > float("-inf"), 1.0, 0.0)
    NUM_WANTED: tl.constexpr = max(1.0, 0.42 * ROOM * min(1.0, BLOCK / VOCAB))
    tail = _quantile(exact, ones, peak * 0 + NUM_WANTED, peak)
    weights = ones if IS_COUNT else tl.exp2((exact - peak) * scale)
    total = _sum(weights)
    middle = _quantile(exact, weights, fraction * total, peak)
    at_middle = _at(exact, weights, middle)
    part, squares = at_middle / tl.maximum(total, 1e-30), weights * weights
    squares_above = _at(exact, squares, middle)
    squares_below = _sum(squares) - squares_above
    deviation = 2.5 * tl.sqrt((1 - part) * (1 - part) * squares_above + part * part * tl.maximum(squares_below, 0.0))
    # Growth rate of the weight at the middle, from two logits a small distance apart.
    step = tl.maximum((peak - middle) * 0.125, 1e-6)
    least = 1e-9 * total + 1e-30
    up = deviation / tl.maximum(at_middle - _at(exact, weights, middle + step), least)
    down = deviation / tl.maximum(_at(exact, weights, middle - step) - at_middle, least)
    return peak, tail, middle - step * tl.minimum(down, 2.0), middle, middle + step * tl.minimum(up, 2.0)


@triton.jit
def _quantile(exact: tl.tensor, weights: tl.tensor, target: tl.tensor, peak: tl.tensor) -> tl.tensor:
    """The largest logit, on bfloat16's grid, with the target at or above it; near the smallest if there is none."""
    least = tl.min(tl.min(tl.where(exact > float("-inf"), exact, peak), axis=1), axis=0)
    low, high = key_of(least) >> 16, (key_of(peak) >> 16) + 1
    while high > low + 1:
        middle = (low + high) >> 1
        is_enough = _at(exact, weights, on_grid(middle, low * 0 + 16)) >= target
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
    return on_grid(low, low * 0 + 16)


@triton.jit
def _at(exact: tl.tensor, weights: tl.tensor, logit: tl.tensor) -> tl.tensor:
    return _sum(tl.where(exact >= logit, weights, 0.0))


@triton.jit
def _sum(weights: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(weights, axis=1), axis=0)


@triton.jit
def measured(
    row: tl.tuple,
    probes: tl.tuple,
    reference: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    IS_COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Count or weight (relative to `reference`) at or above each of four logits, and in total; the largest logit."""
    first, second, third, fourth = probes
    groups = tl.full([BLOCK // INNER], float("-inf"), tl.float32)
    at_first = tl.zeros([BLOCK // INNER], tl.int32 if IS_COUNT else tl.float64)
    at_second, at_third, at_fourth, total = at_first, at_first, at_first, at_first
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=STAGES):
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        groups = tl.maximum(groups, tl.max(exact, axis=1))
        if IS_COUNT:
            at_first += tl.sum((exact >= first).to(tl.int32), axis=1)
            at_second += tl.sum((exact >= second).to(tl.int32), axis=1)
            at_third += tl.sum((exact >= third).to(tl.int32), axis=1)
            at_fourth += tl.sum((exact >= fourth).to(tl.int32), axis=1)
        else:
            weights = weights_of(exact, reference, scale, log_min_p)
            at_first += tl.sum(tl.where(exact >= first, weights, 0.0), axis=1).to(tl.float64)
            at_second += tl.sum(tl.where(exact >= second, weights, 0.0), axis=1).to(tl.float64)
            at_third += tl.sum(tl.where(exact >= third, weights, 0.0), axis=1).to(tl.float64)
            at_fourth += tl.sum(tl.where(exact >= fourth, weights, 0.0), axis=1).to(tl.float64)
            total += tl.sum(weights, axis=1).to(tl.float64)
    return (
        tl.sum(at_first, axis=0).to(tl.float64),
        tl.sum(at_second, axis=0).to(tl.float64),
        tl.sum(at_third, axis=0).to(tl.float64),
        tl.sum(at_fourth, axis=0).to(tl.float64),
        tl.sum(total, axis=0).to(tl.float64),
        tl.max(groups, axis=0),
    )


@triton.jit
def listed(
    row: tl.tuple,
    bottom: tl.tensor,
    top: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    IS_COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Write the logits in [bottom, top), in the vocabulary's order, to the row's scratch memory until it is full.

    Returns:
        How many there are up to the end of each block, [B]; the weight at or above top in each block, [B]; and the
            total count or weight at or above top.
    """
    scratch = row[9]
    blocks = tl.arange(0, NUM_BLOCKS)
    ends, masses = tl.zeros([NUM_BLOCKS], tl.int32), tl.zeros([NUM_BLOCKS], tl.float64)
    num_above = tl.zeros([BLOCK // INNER], tl.int32)
    num_inside = bottom.to(tl.int32) * 0
    # Other threads may still read an earlier list.
    tl.debug_barrier()
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=STAGES):
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        is_inside = (exact >= bottom) & (exact < top)
        inside = is_inside.to(tl.int32)
        of_group = tl.sum(inside, axis=1)
        before = num_inside + tl.cumsum(of_group, axis=0) - of_group
        places = before[:, None] + tl.cumsum(inside, axis=1) - inside
        tl.store(scratch + places, exact, mask=is_inside & (places < ROOM))
        num_inside += tl.sum(of_group, axis=0)
        ends = tl.where(blocks >= block, num_inside, ends)
        if top <= peak:
            weights = tl.where(exact >= top, weights_of(exact, peak, scale, log_min_p), 0.0)
            mass = tl.sum(tl.sum(weights, axis=1).to(tl.float64), axis=0)
            masses = tl.where(blocks == block, mass, masses)
            if IS_COUNT:
                num_above += tl.sum((exact >= top).to(tl.int32), axis=1)
    tl.debug_barrier()
    return ends, masses, tl.sum(num_above, axis=0).to(tl.float64) if IS_COUNT else tl.sum(masses, axis=0)


@triton.jit
def kept_by_row(
    row: tl.tuple,
    threshold: tl.tensor,
    num_equal: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Kept weight of each block, and its number of tokens equal to the threshold, both [B], by a pass over the row."""
    blocks = tl.arange(0, NUM_BLOCKS)
    masses, equals = tl.zeros([NUM_BLOCKS], tl.float64), tl.zeros([NUM_BLOCKS], tl.int32)
    weight = weights_of(threshold, peak, scale, log_min_p).to(tl.float64)
    before = num_equal * 0
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=STAGES):
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        weights = tl.where(exact > threshold, weights_of(exact, peak, scale, log_min_p), 0.0)
        mass = tl.sum(tl.sum(weights, axis=1).to(tl.float64), axis=0)
        count = tl.sum(tl.sum((exact == threshold).to(tl.int32), axis=1), axis=0)
        num_kept = tl.minimum(tl.maximum(num_equal - before, 0), count)
        masses = tl.where(blocks == block, mass + num_kept.to(tl.float64) * weight, masses)
        equals = tl.where(blocks == block, count, equals)
        before += count
    return masses, equals


@triton.jit
def kept_by_list(
    scratch: tl.tensor,
    ends: tl.tensor,
    masses: tl.tensor,
    threshold: tl.tensor,
    num_equal: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    NUM_BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """`kept_by_row` from the list, which must include the threshold; `masses` [B] is the weight above the list."""
    num_inside = tl.max(ends, axis=0)
    exact = on_list(scratch, num_inside, ROOM)
    is_equal = (exact == threshold).to(tl.int32)
    is_kept = (exact > threshold) | ((is_equal > 0) & (tl.cumsum(is_equal, axis=0) <= num_equal))
    sums = tl.cumsum(tl.where(is_kept, weights_of(exact, peak, scale, log_min_p), 0.0).to(tl.float64), axis=0)
    # Both counts are packed into one integer. Float sums could differ in their last bits; here no token is no weight.
    counts = tl.cumsum((is_kept.to(tl.int32) << 16) + is_equal, axis=0)
    blocks = tl.arange(0, NUM_BLOCKS)
    begins = tl.where(blocks > 0, tl.gather(ends, tl.maximum(blocks - 1, 0), axis=0), 0)
    last, before = tl.maximum(ends - 1, 0), tl.maximum(begins - 1, 0)
    counted = tl.gather(counts, last, axis=0) - tl.where(begins > 0, tl.gather(counts, before, axis=0), 0)
    mass = tl.gather(sums, last, axis=0) - tl.where(begins > 0, tl.gather(sums, before, axis=0), 0.0)
    counted = tl.where(ends > begins, counted, 0)
    mass = tl.where(counted >= 1 << 16, tl.maximum(mass, 0.0), 0.0)
    return masses + mass, counted & 0xFFFF


@triton.jit
def on_list(scratch: tl.tensor, num_inside: tl.tensor, ROOM: tl.constexpr) -> tl.tensor:
    """The listed logits, [ROOM]; -infinity in unused entries."""
    places = tl.arange(0, ROOM)
    return tl.load(scratch + places, mask=places < num_inside, other=float("-inf"))
