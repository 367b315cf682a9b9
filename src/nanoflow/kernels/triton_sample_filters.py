"""Filters of a program that samples: top_k and top_p as thresholds on the logit, and what they keep.

A threshold usually takes two passes over the row. The first measures probes that were guessed from a sample of the row:
how many tokens, or how much weight, are at or above each. Interpolating between two probes gives the threshold's
approximate place. The second pass lists the logits around it, and the search ends among them. Wrong guesses cost more
passes; the threshold is always exact.

Shape legend: V vocabulary, B blocks, G groups of a block, I logits of a group.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels.triton_sample_passes import guessed, kept_by_list, kept_by_row, measured
from nanoflow.kernels.triton_sample_rows import TOP_P, key_of, on_grid
from nanoflow.kernels.triton_sample_search import ALL, LOWEST, between, search


@triton.jit
def searched_first(
    row: tl.tuple,
    fraction: tl.tensor,
    scale: tl.tensor,
    grid_bits: tl.tensor,
    IS_COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tuple, tl.tuple]:
    """A first pass at guessed probes.

    Returns:
        The largest logit; the total weight of the row relative to it, or its number of tokens; the probes as places on
            the grid, of which the first has about 0.4 ROOM tokens at or above it; and the amount measured at each.
    """
    reference, tail, lower, middle, upper = guessed(
        row[0], fraction, scale, IS_COUNT, VOCAB, BLOCK, INNER, ROOM
    )  # fmt: skip
    tail, lower = key_of(tail) >> grid_bits, key_of(lower) >> grid_bits
    middle, upper = key_of(middle) >> grid_bits, key_of(upper) >> grid_bits
    probes = on_grid(tail, grid_bits), on_grid(lower, grid_bits), on_grid(middle, grid_bits), on_grid(upper, grid_bits)
    peak, total = reference, fraction.to(tl.float64) * 0
    at_tail, at_lower, at_middle, at_upper = total, total, total, total
    is_measured = False
    while not is_measured:
        at_tail, at_lower, at_middle, at_upper, total, peak = measured(
            row, probes, reference, scale, scale * 0 - float("inf"), IS_COUNT, VOCAB, BLOCK, INNER, STAGES
        )
        # Weights overflow or underflow a float32 if the largest logit was far from the guess.
        is_far = (total < 1e-18) | ((total < 1e18) == 0)
        is_measured = IS_COUNT | (is_far == 0) | (peak == reference) | ((tl.abs(peak) < float("inf")) == 0)
        reference = tl.where(is_measured, reference, peak)
    if IS_COUNT:
        total += VOCAB
    else:
        factor = tl.exp2((reference - peak) * scale).to(tl.float64)
        total, at_tail, at_lower = total * factor, at_tail * factor, at_lower * factor
        at_middle, at_upper = at_middle * factor, at_upper * factor
    return peak, total, (tail, lower, middle, upper), (at_tail, at_lower, at_middle, at_upper)


@triton.jit
def filtered(
    row: tl.tuple,
    floats: tl.tensor,
    top_k: tl.tensor,
    log_min_p: tl.tensor,
    masses: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GRID_BITS: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What top_k, min_p and top_p keep; `masses` and `peak` are only used for rows with min_p and without top_k.

    Returns:
        The threshold; how many of the tokens equal to it are kept, the first ones; the kept weight of each block, [B];
            the number of tokens equal to the threshold in each block, [B]; and the largest logit. If that is not
            finite, the rest is meaningless.
    """
    top_p = tl.load(floats + TOP_P)
    grid_bits = tl.where((row[4] > 0) | row[6], 0, GRID_BITS)
    has_min_p = log_min_p > float("-inf")
    threshold, num_equal, total = scale * 0 + LOWEST, top_k * 0 + ALL, tl.sum(masses, axis=0)
    low, high = top_k * 0, top_k * 0
    at_low, above, tail = total * 0, total * 0, top_k * 0 + ALL
    ends, above_list, equals = tl.zeros([NUM_BLOCKS], tl.int32), masses * 0, tl.zeros([NUM_BLOCKS], tl.int32)
    is_listed = top_k < 0
    if top_k > 0:
        fraction = tl.minimum(top_k.to(tl.float32) / VOCAB, 1.0)
        peak, total, places, amounts = searched_first(
            row, fraction, scale, grid_bits, True, VOCAB, BLOCK, INNER, STAGES, ROOM
        )  # fmt: skip
        low, high = key_of(scale * 0 + LOWEST) >> grid_bits, _end(peak, grid_bits)
        target, tail = top_k.to(tl.float64), places[0]
        low, high, at_low, above = between(low, high, total, above, places, amounts, target)
        low, above, is_listed, ends, above_list = search(
            row, target, low, high, at_low, above, tail, is_listed, ends, above_list, grid_bits, peak, scale, log_min_p,
            True, VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS, ROOM,
        )  # fmt: skip
        threshold, num_equal, tail = on_grid(low, grid_bits), top_k - above.to(tl.int32), tail * 0 + ALL
    if (top_k > 0) | has_min_p:
        masses, equals = _kept(
            row, threshold, num_equal, is_listed, ends, above_list, peak, scale, log_min_p,
            VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS, ROOM,
        )  # fmt: skip
        # The list can be used by the next search too if no logit is above it.
        is_listed = is_listed & (tl.sum(above_list, axis=0) == 0)
        total = tl.sum(masses, axis=0)
    if top_p < 1:
        part = top_p.to(tl.float64)
        # Places that are between no others.
        nowhere = top_k * 0 - ALL
        amounts, places = (total, total, total, total), (nowhere, nowhere, nowhere, nowhere)
        if ((top_k > 0) | has_min_p) == 0:
            peak, total, places, amounts = searched_first(
                row, top_p, scale, grid_bits, False, VOCAB, BLOCK, INNER, STAGES, ROOM
            )  # fmt: skip
            tail = places[0]
        # All tokens lighter than this together weigh less than top_p leaves out.
        least = tl.log2(((1 - part) * total / VOCAB).to(tl.float32)) - 0.001
        floor = tl.maximum(tl.maximum(peak + least / scale, threshold), LOWEST)
        # In a row that is not finite the floor may be NaN.
        low = key_of(tl.where(tl.abs(peak) < float("inf"), floor, LOWEST)) >> grid_bits
        high, target = _end(peak, grid_bits), part * total
        low, high, at_low, above = between(low, high, total, total * 0, places, amounts, target)
        low, above, is_listed, ends, above_list = search(
            row, target, low, high, at_low, above, tail, is_listed, ends, above_list, grid_bits, peak, scale, log_min_p,
            False, VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS, ROOM,
        )  # fmt: skip
        border = on_grid(low, grid_bits)
        weight = tl.exp2((border - peak) * scale).to(tl.float64)
        most = tl.where(border == threshold, num_equal, ALL).to(tl.float64)
        wanted = tl.ceil((target - above) / tl.maximum(weight, 1e-300))
        num_equal = tl.minimum(tl.maximum(wanted, 1.0), most).to(tl.int32)
        threshold = border
        masses, equals = _kept(
            row, threshold, num_equal, is_listed, ends, above_list, peak, scale, log_min_p,
            VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS, ROOM,
        )  # fmt: skip
    return threshold, num_equal, masses, equals, peak


@triton.jit
def _end(peak: tl.tensor, grid_bits: tl.tensor) -> tl.tensor:
    """The place above the largest logit's; the lowest place if that is not finite, so that nothing is searched."""
    return (key_of(tl.where(tl.abs(peak) < float("inf"), peak, LOWEST)) >> grid_bits) + 1


@triton.jit
def _kept(
    row: tl.tuple,
    threshold: tl.tensor,
    num_equal: tl.tensor,
    is_listed: tl.tensor,
    ends: tl.tensor,
    above_list: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    log_min_p: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Kept weight of each block, and its number of tokens equal to the threshold, both [B]."""
    masses, equals = above_list, ends
    if is_listed:
        masses, equals = kept_by_list(
            row[9], ends, above_list, threshold, num_equal, peak, scale, log_min_p, NUM_BLOCKS, ROOM
        )  # fmt: skip
    else:
        masses, equals = kept_by_row(
            row, threshold, num_equal, peak, scale, log_min_p, VOCAB, BLOCK, INNER, STAGES, NUM_BLOCKS
        )  # fmt: skip
    return masses, equals
