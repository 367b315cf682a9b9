"""Filters of a program that samples: top_k and top_p as thresholds on the logit, and what they keep.

A threshold is found by passes over the row that measure, at three probes at once, how many tokens or how much weight
lie at or above, until few enough tokens are left between two probes to be gathered.

Shape legend: V vocabulary, B blocks, G groups of a block, I logits of a group.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels.triton_sample_rows import TOP_P, adjusted, key_of, on_grid, weights_of

# The threshold that every token with a weight reaches, and more tokens than any row has.
LOWEST, ALL = tl.constexpr(-3.4028234663852886e38), tl.constexpr((1 << 31) - 1)


@triton.jit
def filtered(
    row: tl.tuple,
    floats: tl.tensor,
    top_k: tl.tensor,
    log_min_p: tl.tensor,
    masses: tl.tensor,
    of_groups: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GRID_BITS: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What top_k, min_p and top_p leave.

    Returns:
        The threshold; how many of the tokens equal to it stay, the first ones; the weight that each block keeps, [B];
        and the number of tokens equal to the threshold in each block, [B].
    """
    top_p = tl.load(floats + TOP_P).to(tl.float64)
    grid_bits = tl.where((row[4] > 0) | row[6], 0, GRID_BITS)
    threshold, num_equal = peak * 0 + LOWEST, top_k * 0 + ALL
    equals = tl.zeros([NUM_BLOCKS], tl.int32)
    if top_k > 0:
        # As many tokens as there are groups reach the least of the groups' largest.
        floor = tl.where(top_k <= BLOCK // INNER, tl.min(of_groups, axis=0), LOWEST)
        threshold, above = _search(
            row, top_k.to(tl.float64), tl.maximum(floor, LOWEST), grid_bits, peak, scale, log_min_p, True,
            VOCAB, BLOCK, INNER, ROOM,
        )  # fmt: skip
        num_equal = top_k - above.to(tl.int32)
    if (top_k > 0) | (log_min_p > float("-inf")):
        masses, equals = _kept(row, threshold, num_equal, peak, scale, log_min_p, VOCAB, BLOCK, INNER, NUM_BLOCKS)
    if top_p < 1:
        total = tl.sum(masses, axis=0)
        # Tokens lighter than this have less weight in all than top_p leaves out.
        least = tl.log2(((1 - top_p) * total / VOCAB).to(tl.float32)) - 0.001
        floor = tl.maximum(tl.maximum(peak + least / scale, threshold), LOWEST)
        border, above = _search(
            row, top_p * total, floor, grid_bits, peak, scale, log_min_p, False, VOCAB, BLOCK, INNER, ROOM
        )
        weight = tl.exp2((border - peak) * scale).to(tl.float64)
        most = tl.where(border == threshold, num_equal, ALL).to(tl.float64)
        wanted = tl.ceil((top_p * total - above) / tl.maximum(weight, 1e-300))
        num_equal = tl.minimum(tl.maximum(wanted, 1.0), most).to(tl.int32)
        threshold = border
        masses, equals = _kept(row, threshold, num_equal, peak, scale, log_min_p, VOCAB, BLOCK, INNER, NUM_BLOCKS)
    return threshold, num_equal, masses, equals


@triton.jit
def _search(
    row: tl.tuple,
    target: tl.tensor,
    floor: tl.tensor,
    grid_bits: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    IS_COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The largest logit of the row with the target (a count, or a weight) at or above it, and what is above it.

    `floor` is a logit with the target at or above it; `LOWEST` if that is not known, and the answer if there is none.
    Logits are searched as integers in the same order. The answer lies in [low, high).
    """
    scratch = row[9]
    low, high = key_of(floor) >> grid_bits, (key_of(peak) >> grid_bits) + 1
    above = target * 0
    num_passes = low * 0
    # Tokens in [low, high), or a few times as many; a floor for a count is close.
    num_inside = tl.where((floor > LOWEST) & IS_COUNT, 0, ALL)
    while high > low + 1:
        bottom, top = on_grid(low, grid_bits), on_grid(high, grid_bits)
        if num_inside <= 3 * ROOM:
            num_inside = _gathered(row, bottom, top, VOCAB, BLOCK, INNER, ROOM)
            if num_inside <= ROOM:
                exact = tl.load(scratch + tl.arange(0, ROOM), mask=tl.arange(0, ROOM) < num_inside, other=float("-inf"))
                low, above = _finished(
                    exact, num_inside, low, high, above, target, grid_bits, peak, scale, log_min_p, IS_COUNT
                )
                high = low + 1
            num_inside = tl.where(num_inside <= ROOM, num_inside, ALL)
        else:
            first, second, third = _probes(low, high, bottom, top, peak, grid_bits, num_passes)
            at_first, at_second, at_third, num_inside = _measured(
                row, bottom, top, on_grid(first, grid_bits), on_grid(second, grid_bits), on_grid(third, grid_bits),
                peak, scale, log_min_p, IS_COUNT, VOCAB, BLOCK, INNER,
            )  # fmt: skip
            low = tl.where(at_first >= target, first, low)
            low = tl.where(at_second >= target, second, low)
            low = tl.where(at_third >= target, third, low)
            is_below, is_at, is_above = at_first < target, at_second < target, at_third < target
            high = tl.where(is_below, first, tl.where(is_at, second, tl.where(is_above, third, high)))
            above = tl.where(is_below, at_first, tl.where(is_at, at_second, tl.where(is_above, at_third, above)))
        num_passes += 1
    return on_grid(low, grid_bits), above


@triton.jit
def _gathered(
    row: tl.tuple,
    bottom: tl.tensor,
    top: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ROOM: tl.constexpr,
) -> tl.tensor:
    """How many logits are in [bottom, top), of which the first are written to the row's scratch memory."""
    scratch = row[9]
    # Of an earlier search others may still be read.
    tl.debug_barrier()
    num_inside = bottom.to(tl.int32) * 0
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        is_inside = (exact >= bottom) & (exact < top)
        inside = is_inside.to(tl.int32)
        of_group = tl.sum(inside, axis=1)
        before = num_inside + tl.cumsum(of_group, axis=0) - of_group
        places = before[:, None] + tl.cumsum(inside, axis=1) - inside
        tl.store(scratch + places, exact, mask=is_inside & (places < ROOM))
        num_inside += tl.sum(of_group, axis=0)
    tl.debug_barrier()
    return num_inside


@triton.jit
def _finished(
    exact: tl.tensor,
    num_inside: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    above: tl.tensor,
    target: tl.tensor,
    grid_bits: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    IS_COUNT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The search among logits that are all of [low, high): its end, and what is above it; `above` is above high."""
    if IS_COUNT:
        weights = (exact > float("-inf")).to(tl.float64)
    else:
        weights = weights_of(exact, peak, scale, log_min_p).to(tl.float64)
    if num_inside > 0:
        least = tl.min(tl.where(exact > float("-inf"), exact, float("inf")), axis=0)
        low = tl.maximum(low, key_of(least) >> grid_bits)
        high = tl.minimum(high, (key_of(tl.max(exact, axis=0)) >> grid_bits) + 1)
    else:
        high = low + 1
    beyond = above
    while high > low + 1:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        at_middle = beyond + tl.sum(tl.where(exact >= on_grid(middle, grid_bits), weights, 0.0), axis=0)
        is_enough = at_middle >= target
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
        above = tl.where(is_enough, above, at_middle)
    return low, above


@triton.jit
def _probes(
    low: tl.tensor,
    high: tl.tensor,
    bottom: tl.tensor,
    top: tl.tensor,
    peak: tl.tensor,
    grid_bits: tl.tensor,
    num_passes: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Three places between low and high, in order: by value, and at times by bits, which always ends."""
    if bottom == LOWEST:
        first, second, third = key_of(peak - 64.0), key_of(peak - 16.0), key_of(peak - 4.0)
    else:
        first = key_of(bottom * 0.75 + top * 0.25)
        second = key_of(bottom * 0.5 + top * 0.5)
        third = key_of(bottom * 0.25 + top * 0.75)
    first, second, third = first >> grid_bits, second >> grid_bits, third >> grid_bits
    if num_passes % 4 == 3:
        # Halves without an overflow of the difference.
        second = (low >> 1) + (high >> 1) + (low & high & 1)
        first = (low >> 1) + (second >> 1) + (low & second & 1)
        third = (second >> 1) + (high >> 1) + (second & high & 1)
    first = tl.minimum(tl.maximum(first, low + 1), high - 1)
    second = tl.minimum(tl.maximum(second, low + 1), high - 1)
    third = tl.minimum(tl.maximum(third, low + 1), high - 1)
    return first, second, third


@triton.jit
def _measured(
    row: tl.tuple,
    bottom: tl.tensor,
    top: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    IS_COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Count or weight of the tokens at or above each of three logits, and the number of tokens in [bottom, top)."""
    at_first = tl.zeros([BLOCK // INNER], tl.float64)
    at_second, at_third = at_first, at_first
    num_inside = tl.zeros([BLOCK // INNER], tl.int32)
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        if IS_COUNT:
            weights = tl.full([BLOCK // INNER, INNER], 1.0, tl.float32)
        else:
            weights = weights_of(exact, peak, scale, log_min_p)
        at_first += tl.sum(tl.where(exact >= first, weights, 0.0), axis=1).to(tl.float64)
        at_second += tl.sum(tl.where(exact >= second, weights, 0.0), axis=1).to(tl.float64)
        at_third += tl.sum(tl.where(exact >= third, weights, 0.0), axis=1).to(tl.float64)
        num_inside += tl.sum(((exact >= bottom) & (exact < top)).to(tl.int32), axis=1)
    return (
        tl.sum(at_first, axis=0),
        tl.sum(at_second, axis=0),
        tl.sum(at_third, axis=0),
        tl.sum(num_inside, axis=0),
    )


@triton.jit
def _kept(
    row: tl.tuple,
    threshold: tl.tensor,
    num_equal: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Weight that each block keeps, and its number of tokens equal to the threshold, both [B]."""
    blocks = tl.arange(0, NUM_BLOCKS)
    masses, equals = tl.zeros([NUM_BLOCKS], tl.float64), tl.zeros([NUM_BLOCKS], tl.int32)
    weight = weights_of(threshold, peak, scale, log_min_p).to(tl.float64)
    before = num_equal * 0
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        weights = tl.where(exact > threshold, weights_of(exact, peak, scale, log_min_p), 0.0)
        mass = tl.sum(tl.sum(weights, axis=1).to(tl.float64), axis=0)
        count = tl.sum(tl.sum((exact == threshold).to(tl.int32), axis=1), axis=0)
        num_kept = tl.minimum(tl.maximum(num_equal - before, 0), count)
        masses = tl.where(blocks == block, mass + num_kept.to(tl.float64) * weight, masses)
        equals = tl.where(blocks == block, count, equals)
        before += count
    return masses, equals
