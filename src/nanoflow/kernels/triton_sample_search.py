"""The search for a threshold: first between measured probes, then among the logits that a pass has listed.

Shape legend: V vocabulary, B blocks, G groups of a block, I logits of a group.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels.triton_sample_passes import listed, measured, on_list
from nanoflow.kernels.triton_sample_rows import key_of, on_grid, weights_of

# A threshold that every token with a weight reaches, and a count that exceeds that of any row.
LOWEST, ALL = tl.constexpr(-3.4028234663852886e38), tl.constexpr((1 << 31) - 1)


@triton.jit
def search(
    row: tl.tuple,
    target: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    at_low: tl.tensor,
    above: tl.tensor,
    tail: tl.tensor,
    is_listed: tl.tensor,
    ends: tl.tensor,
    above_list: tl.tensor,
    grid_bits: tl.tensor,
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
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The place of the largest logit with the target (a count, or a weight) at or above it, and the amount above it.

    Places are integers with the order of the logits; the result is in [low, high). `at_low` is the amount at or above
    low, or slightly more; `above` that at or above high. Few tokens are expected at or above the place `tail`. Also
    returns whether the list includes the place, the end of each block in the list, and each block's weight above the
    list, both [B].
    """
    num_passes = low * 0
    while high > low + 1:
        if is_listed == 0:
            first, last, middle, is_narrow = _window(
                low, high, at_low, above, target, tail, grid_bits, peak, scale, num_passes, IS_COUNT, ROOM
            )
            if is_narrow:
                ends, above_list, at_last = listed(
                    row, on_grid(first, grid_bits), on_grid(last, grid_bits), peak, scale, log_min_p,
                    IS_COUNT, VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS, ROOM,
                )  # fmt: skip
                tail = tail * 0 + ALL
                at_first = at_last
                num_inside = tl.max(ends, axis=0)
                if num_inside <= ROOM:
                    weights = _amounts(on_list(row[9], num_inside, ROOM), peak, scale, log_min_p, IS_COUNT)
                    at_first += tl.sum(weights, axis=0)
                # In a row with fewer tokens than the target, the search ends at the lowest place.
                is_listed = (num_inside <= ROOM) & ((at_last < target) | (last == high))
                is_listed = is_listed & ((at_first >= target) | (first == low))
                if is_listed:
                    low, high, above = first, last, at_last
                else:
                    low, high, at_low, above = _narrowed(low, high, at_low, above, last, at_last, target)
                    if num_inside <= ROOM:
                        low, high, at_low, above = _narrowed(low, high, at_low, above, first, at_first, target)
            else:
                places = _probes(low, high, middle, peak, grid_bits, num_passes)
                first_at, second_at, third_at, fourth_at, _, _ = measured(
                    row,
                    (on_grid(places[0], grid_bits), on_grid(places[1], grid_bits), on_grid(places[2], grid_bits),
                    on_grid(places[3], grid_bits)),
                    peak, scale, log_min_p, IS_COUNT, VOCAB, BLOCK, INNER, STAGES,
                )  # fmt: skip
                amounts = first_at, second_at, third_at, fourth_at
                low, high, at_low, above = between(low, high, at_low, above, places, amounts, target)
            num_passes += 1
        if is_listed:
            low, above = _finished(
                row[9],
                tl.max(ends, axis=0),
                low,
                high,
                above,
                target,
                grid_bits,
                peak,
                scale,
                log_min_p,
                IS_COUNT,
                ROOM,
            )
            high = low + 1
    return low, above, is_listed, ends, above_list


@triton.jit
def _window(
    low: tl.tensor,
    high: tl.tensor,
    at_low: tl.tensor,
    above: tl.tensor,
    target: tl.tensor,
    tail: tl.tensor,
    grid_bits: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    num_passes: tl.tensor,
    IS_COUNT: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Places between which to list, around the expected threshold; the logit in the middle; if they are close."""
    bottom, top = on_grid(low, grid_bits), on_grid(high, grid_bits)
    part = ((target - above) / tl.maximum(at_low - above, 1e-300)).to(tl.float32)
    part = tl.minimum(tl.maximum(part, 0.0), 1.0)
    middle = top * (1 - part) + bottom * part
    weight = 1.0 if IS_COUNT else tl.maximum(tl.exp2((middle - peak) * scale), 1e-30)
    # Tokens between low and high, assuming that they are spread evenly.
    num_inside = tl.minimum((at_low - above).to(tl.float32) / weight, 1e12)
    half = (top - bottom) * tl.minimum(0.3 * ROOM / tl.maximum(num_inside, 1.0), 1.0)
    first = tl.maximum(key_of(middle - half) >> grid_bits, low)
    last = tl.minimum(tl.maximum((key_of(middle + half) >> grid_bits) + 1, first + 1), high)
    is_whole = (low >= tail) | (num_inside <= 0.6 * ROOM)
    is_narrow = (low >= tail) | ((num_inside <= 12 * ROOM) & (num_passes % 4 != 3))
    return tl.where(is_whole, low, first), tl.where(is_whole, high, last), middle, is_narrow


@triton.jit
def _probes(
    low: tl.tensor,
    high: tl.tensor,
    middle: tl.tensor,
    peak: tl.tensor,
    grid_bits: tl.tensor,
    num_passes: tl.tensor,
) -> tl.tuple:
    """Four places between low and high: by value, and in some passes by bits, which guarantees an end."""
    bottom, top = on_grid(low, grid_bits), on_grid(high, grid_bits)
    if bottom < -1e38:
        first, second, third = key_of(peak - 64.0), key_of(peak - 16.0), key_of(peak - 4.0)
    else:
        first = key_of(bottom * 0.75 + top * 0.25)
        second = key_of(bottom * 0.5 + top * 0.5)
        third = key_of(bottom * 0.25 + top * 0.75)
    first, second, third = first >> grid_bits, second >> grid_bits, third >> grid_bits
    if num_passes % 4 == 3:
        # The middle, without overflow of the sum.
        second = (low >> 1) + (high >> 1) + (low & high & 1)
        first = (low >> 1) + (second >> 1) + (low & second & 1)
        third = (second >> 1) + (high >> 1) + (second & high & 1)
    fourth = key_of(middle) >> grid_bits
    return (
        tl.minimum(tl.maximum(first, low + 1), high - 1),
        tl.minimum(tl.maximum(second, low + 1), high - 1),
        tl.minimum(tl.maximum(third, low + 1), high - 1),
        tl.minimum(tl.maximum(fourth, low + 1), high - 1),
    )


@triton.jit
def between(
    low: tl.tensor,
    high: tl.tensor,
    at_low: tl.tensor,
    above: tl.tensor,
    places: tl.tuple,
    amounts: tl.tuple,
    target: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Apply `_narrowed` for four places."""
    for probe in tl.static_range(4):
        low, high, at_low, above = _narrowed(low, high, at_low, above, places[probe], amounts[probe], target)
    return low, high, at_low, above


@triton.jit
def _narrowed(
    low: tl.tensor,
    high: tl.tensor,
    at_low: tl.tensor,
    above: tl.tensor,
    place: tl.tensor,
    amount: tl.tensor,
    target: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Narrow [low, high) by the amount at or above a place; unchanged if the place is outside."""
    is_inside, is_enough = (place > low) & (place < high), amount >= target
    is_low, is_high = is_inside & is_enough, is_inside & (is_enough == 0)
    return (
        tl.where(is_low, place, low),
        tl.where(is_high, place, high),
        tl.where(is_low, amount, at_low),
        tl.where(is_high, amount, above),
    )


@triton.jit
def _amounts(
    exact: tl.tensor, peak: tl.tensor, scale: tl.tensor, log_min_p: tl.tensor, IS_COUNT: tl.constexpr
) -> tl.tensor:
    """What each logit adds to the amount (1, or its weight), float64."""
    if IS_COUNT:
        amounts = (exact > float("-inf")).to(tl.float64)
    else:
        amounts = weights_of(exact, peak, scale, log_min_p).to(tl.float64)
    return amounts


@triton.jit
def _finished(
    scratch: tl.tensor,
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
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The search among listed logits, which are all those in [low, high): the place found, and the amount above it."""
    exact = on_list(scratch, num_inside, ROOM)
    amounts = _amounts(exact, peak, scale, log_min_p, IS_COUNT)
    least = tl.min(tl.where(exact > float("-inf"), exact, float("inf")), axis=0)
    if num_inside > 0:
        low = tl.maximum(low, key_of(least) >> grid_bits)
        high = tl.minimum(high, (key_of(tl.max(exact, axis=0)) >> grid_bits) + 1)
    beyond = above
    while high > low + 1:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        at_middle = beyond + tl.sum(tl.where(exact >= on_grid(middle, grid_bits), amounts, 0.0), axis=0)
        is_enough = at_middle >= target
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
        above = tl.where(is_enough, above, at_middle)
    return low, above
