"""Programs that choose tokens from logits, one a row, which stream the row's logits instead of sorting them.

A row is read once for its largest logit and for the weight of each block of the vocabulary. A filter (top_k, top_p) is
a threshold on the logit, found by passes that measure, at three probes at once, how many tokens or how much weight lie
above. The draw then picks a block by its weight, and reads that block again for the token.

Weights are 2 ** ((logit - largest) * scale) in float32; eight neighbours are summed in float32, all else in float64.
Shape legend: S rows, V vocabulary, R rows of the tables, B blocks, G groups of a block, I logits of a group.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

# Places of a row's numbers, as `sample.NUMBERS` lays them out, in units of 4 bytes.
ROW, POSITION, SEED, SCALE, TOP_K, TOP_P, LOG_MIN_P = (tl.constexpr(place) for place in (0, 1, 2, 4, 5, 6, 7))
REPETITION, PRESENCE, FREQUENCY, FIRST_FREE_STOP = (tl.constexpr(place) for place in (8, 9, 10, 11))
NUM_EDITS, NUM_BIASES, HAS_PENALTIES, NUM_FIELDS = (tl.constexpr(place) for place in (12, 13, 14, 16))
# Of the table of seen tokens: the bit of the prompt, and the largest count.
IN_PROMPT, MAX_COUNT = tl.constexpr(1 << 14), tl.constexpr((1 << 14) - 1)
# The threshold that every token with a weight reaches, and more tokens than any row has.
LOWEST, ALL = tl.constexpr(-3.4028234663852886e38), tl.constexpr((1 << 31) - 1)
# Entries of a row's list of edits that are looked at in one step.
_EDITS = tl.constexpr(256)


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
    """The largest logit of each row and its token, the lowest of equals: best [S] and token_ids [S] of logits [S, V]."""
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * VOCAB
    blocks = tl.arange(0, NUM_BLOCKS)
    largest = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = _read(row, block * BLOCK, VOCAB, BLOCK, INNER)
        largest = tl.where(blocks == block, tl.max(tl.max(exact, axis=1), axis=0), largest)
    peak = tl.max(largest, axis=0)
    block = tl.min(tl.where(largest == peak, blocks, NUM_BLOCKS - 1), axis=0)
    exact = _read(row, block * BLOCK, VOCAB, BLOCK, INNER)
    tl.store(best + place, peak)
    tl.store(token_ids + place, _first(exact == peak, block * BLOCK, VOCAB, BLOCK, INNER).to(tl.int64))


@triton.jit(do_not_specialize=["edit_stride"], do_not_specialize_on_alignment=["numbers", "floats", "seeds"])
def choose_program(
    logits: tl.tensor,
    numbers: tl.tensor,
    floats: tl.tensor,
    seeds: tl.tensor,
    seen: tl.tensor,
    edit_ids: tl.tensor,
    edit_values: tl.tensor,
    edit_stride: int,
    token_ids: tl.tensor,
    best: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GRID_BITS: tl.constexpr,
) -> None:
    """Largest adjusted logit and chosen token of each row: best [S] and token_ids [S] of logits [S, V].

    numbers [S], given three times, are `sample.NUMBERS`; seen [R, V] and edits [R, edit_stride] are its tables.
    GRID_BITS low bits of a logit of this type are zero as a float32.
    """
    place = tl.program_id(0).to(tl.int64)
    numbers += place * NUM_FIELDS
    floats += place * NUM_FIELDS
    table_row = tl.load(numbers + ROW).to(tl.int64)
    seen += table_row * VOCAB
    is_held = tl.load(numbers + POSITION) < tl.load(numbers + FIRST_FREE_STOP)
    num_edits = tl.where(is_held | (tl.load(numbers + NUM_BIASES) > 0), tl.load(numbers + NUM_EDITS), 0)
    has_penalties = tl.load(numbers + HAS_PENALTIES) > 0
    row = (
        logits + place * VOCAB,
        seen,
        edit_ids + table_row * edit_stride,
        edit_values + table_row * edit_stride,
        num_edits,
        is_held,
        has_penalties,
        tl.load(floats + REPETITION),
        tl.load(floats + PRESENCE),
        tl.load(floats + FREQUENCY),
    )
    scale = tl.load(floats + SCALE)
    blocks = tl.arange(0, NUM_BLOCKS)
    largest = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    masses = tl.zeros([NUM_BLOCKS], tl.float64)
    of_groups = tl.full([BLOCK // INNER], float("-inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = _adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        groups = tl.max(exact, axis=1)
        of_groups = tl.maximum(of_groups, groups)
        peak = tl.max(groups, axis=0)
        largest = tl.where(blocks == block, peak, largest)
        if scale > 0:
            # Relative to what is finite: a block may have no token that can be drawn.
            peak = tl.where((peak > float("-inf")) & (peak < float("inf")), peak, 0.0)
            mass = tl.sum(tl.sum(tl.exp2((exact - peak) * scale), axis=1).to(tl.float64), axis=0)
            masses = tl.where(blocks == block, mass, masses)
    peak = tl.max(largest, axis=0)
    tl.store(best + place, peak)
    if (scale > 0) & (peak > float("-inf")) & (peak < float("inf")):
        rises = tl.where(largest > float("-inf"), (largest - peak) * scale, float("-inf"))
        masses *= tl.exp2(rises).to(tl.float64)
        log_min_p = tl.load(floats + LOG_MIN_P)
        threshold, num_equal, masses, equals = _filtered(
            row, floats, tl.load(numbers + TOP_K), log_min_p, masses, of_groups, peak, scale,
            VOCAB, BLOCK, INNER, NUM_BLOCKS, GRID_BITS,
        )  # fmt: skip
        uniform = _uniform(tl.load(seeds + place * (NUM_FIELDS // 2) + SEED // 2), tl.load(numbers + POSITION))
        token_id = _drawn(
            row, uniform, threshold, num_equal, masses, equals, peak, scale, log_min_p, VOCAB, BLOCK, INNER, NUM_BLOCKS
        )
    else:
        block = tl.min(tl.where(largest == peak, blocks, NUM_BLOCKS - 1), axis=0)
        exact = _adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        token_id = _first(exact == peak, block * BLOCK, VOCAB, BLOCK, INNER)
    tl.store(token_ids + place, token_id.to(tl.int64))
    if has_penalties:
        count = tl.load(seen + token_id)
        tl.store(seen + token_id, tl.where((count & MAX_COUNT) < MAX_COUNT, count + 1, count).to(tl.int16))


@triton.jit
def _read(
    row: tl.tensor, first: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr
) -> tl.tensor:
    """A block of logits as float32 [G, I]: infinity where they are not numbers, -infinity outside the vocabulary."""
    columns = _columns(first, BLOCK, INNER)
    exact = tl.load(row + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(exact == exact, exact, float("inf"))


@triton.jit
def _columns(first: tl.tensor, BLOCK: tl.constexpr, INNER: tl.constexpr) -> tl.tensor:
    """Token ids of a block, [G, I]."""
    return first + tl.arange(0, BLOCK // INNER)[:, None] * INNER + tl.arange(0, INNER)[None, :]


@triton.jit
def _first(
    is_wanted: tl.tensor, first: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr
) -> tl.tensor:
    """The lowest token id of a block that is wanted; the last of the vocabulary if none is."""
    columns = _columns(first, BLOCK, INNER)
    return tl.min(tl.min(tl.where(is_wanted, columns, VOCAB - 1), axis=1), axis=0)


@triton.jit
def _adjusted(
    row: tl.tuple, first: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr
) -> tl.tensor:
    """`_read`, with biases, then penalties applied, and stop tokens that are held back at -infinity."""
    logits, seen, edit_ids, edit_values, num_edits, is_held, has_penalties, repetition, presence, frequency = row
    exact = _read(logits, first, VOCAB, BLOCK, INNER)
    columns = _columns(first, BLOCK, INNER)
    if num_edits > 0:
        begin, end = first * 0, first * 0
        for at in range(0, num_edits, _EDITS):
            places = at + tl.arange(0, _EDITS)
            ids = tl.load(edit_ids + places, mask=places < num_edits, other=VOCAB + BLOCK)
            begin += tl.sum((ids < first).to(tl.int32), axis=0)
            end += tl.sum((ids < first + BLOCK).to(tl.int32), axis=0)
        for edit in range(begin, end):
            value = tl.load(edit_values + edit)
            is_stop = value == float("-inf")
            edited = tl.where(is_stop, float("-inf"), exact + value)
            exact = tl.where((columns == tl.load(edit_ids + edit)) & (is_held | (is_stop == 0)), edited, exact)
    if has_penalties:
        record = tl.load(seen + columns, mask=columns < VOCAB, other=0).to(tl.int32)
        count = record & MAX_COUNT
        factor = tl.where(record > 0, repetition, 1.0)
        exact = tl.where(exact > 0, tl.div_rn(exact, factor), exact * factor)
        exact = exact - frequency * count.to(tl.float32)
        exact = exact - tl.where(count > 0, presence, 0.0)
    return exact


@triton.jit
def _filtered(
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
            VOCAB, BLOCK, INNER,
        )  # fmt: skip
        num_equal = top_k - above.to(tl.int32)
    if (top_k > 0) | (log_min_p > float("-inf")):
        masses, equals = _kept(
            row, threshold, num_equal, peak, scale, log_min_p, VOCAB, BLOCK, INNER, NUM_BLOCKS
        )
    if top_p < 1:
        total = tl.sum(masses, axis=0)
        # Tokens lighter than this have less weight in all than top_p leaves out.
        least = tl.log2(((1 - top_p) * total / VOCAB).to(tl.float32)) - 0.001
        floor = tl.maximum(tl.maximum(peak + least / scale, threshold), LOWEST)
        border, above = _search(
            row, top_p * total, floor, grid_bits, peak, scale, log_min_p, False, VOCAB, BLOCK, INNER
        )
        weight = tl.exp2((border - peak) * scale).to(tl.float64)
        most = tl.where(border == threshold, num_equal, ALL).to(tl.float64)
        wanted = tl.ceil((top_p * total - above) / tl.maximum(weight, 1e-300))
        num_equal = tl.minimum(tl.maximum(wanted, 1.0), most).to(tl.int32)
        threshold = border
        masses, equals = _kept(
            row, threshold, num_equal, peak, scale, log_min_p, VOCAB, BLOCK, INNER, NUM_BLOCKS
        )
    return threshold, num_equal, masses, equals


@triton.jit
def _weights(exact: tl.tensor, peak: tl.tensor, scale: tl.tensor, log_min_p: tl.tensor) -> tl.tensor:
    """Weights relative to that of the largest logit; 0 for tokens that min_p leaves out."""
    logs = (exact - peak) * scale
    return tl.where(logs >= log_min_p, tl.exp2(logs), 0.0)


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
) -> tuple[tl.tensor, tl.tensor]:
    """The largest logit of the row with the target (a count, or a weight) at or above it, and what is above it.

    `floor` is a logit with the target at or above it; `LOWEST` if that is not known, and the answer if there is none.
    Logits are searched as integers in the same order. The answer lies in [low, high).
    """
    low, high = _key(floor) >> grid_bits, (_key(peak) >> grid_bits) + 1
    above = target * 0
    num_passes = low * 0
    while high > low + 1:
        bottom, top = _on_grid(low, grid_bits), _on_grid(high, grid_bits)
        first, second, third = _probes(low, high, bottom, top, peak, grid_bits, num_passes)
        at_first, at_second, at_third, least, most = _measured(
            row, bottom, top, _on_grid(first, grid_bits), _on_grid(second, grid_bits), _on_grid(third, grid_bits),
            peak, scale, log_min_p, IS_COUNT, VOCAB, BLOCK, INNER,
        )  # fmt: skip
        if least >= most:
            # One value is left, or none above the floor.
            low = tl.where(least == most, _key(least) >> grid_bits, low)
            high = low + 1
        else:
            low = tl.where(at_first >= target, first, low)
            low = tl.where(at_second >= target, second, low)
            low = tl.where(at_third >= target, third, low)
            is_below, is_at, is_above = at_first < target, at_second < target, at_third < target
            high = tl.where(is_below, first, tl.where(is_at, second, tl.where(is_above, third, high)))
            above = tl.where(
                is_below, at_first, tl.where(is_at, at_second, tl.where(is_above, at_third, above))
            )
        num_passes += 1
    return _on_grid(low, grid_bits), above


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
        first, second, third = _key(peak - 64.0), _key(peak - 16.0), _key(peak - 4.0)
    else:
        first = _key(bottom * 0.75 + top * 0.25)
        second = _key(bottom * 0.5 + top * 0.5)
        third = _key(bottom * 0.25 + top * 0.75)
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
def _key(exact: tl.tensor) -> tl.tensor:
    """An int32 that is in the order of the float32."""
    bits = exact.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _logit(key: tl.tensor) -> tl.tensor:
    """The float32 of a `_key`."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _on_grid(place: tl.tensor, grid_bits: tl.tensor) -> tl.tensor:
    """The logit whose `_key` without its low bits is `place`: of a negative one these bits are ones in the key."""
    key = place << grid_bits
    return _logit(tl.where(key < 0, key | ((1 << grid_bits) - 1), key))


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
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Count or weight of the tokens at or above each of three logits, and the least and largest in [bottom, top)."""
    at_first = tl.zeros([BLOCK // INNER], tl.float64)
    at_second, at_third = at_first, at_first
    least = tl.full([BLOCK // INNER], float("inf"), tl.float32)
    most = tl.full([BLOCK // INNER], float("-inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = _adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        if IS_COUNT:
            weights = tl.full([BLOCK // INNER, INNER], 1.0, tl.float32)
        else:
            weights = _weights(exact, peak, scale, log_min_p)
        at_first += tl.sum(tl.where(exact >= first, weights, 0.0), axis=1).to(tl.float64)
        at_second += tl.sum(tl.where(exact >= second, weights, 0.0), axis=1).to(tl.float64)
        at_third += tl.sum(tl.where(exact >= third, weights, 0.0), axis=1).to(tl.float64)
        is_inside = (exact >= bottom) & (exact < top)
        least = tl.minimum(least, tl.min(tl.where(is_inside, exact, float("inf")), axis=1))
        most = tl.maximum(most, tl.max(tl.where(is_inside, exact, float("-inf")), axis=1))
    return (
        tl.sum(at_first, axis=0),
        tl.sum(at_second, axis=0),
        tl.sum(at_third, axis=0),
        tl.min(least, axis=0),
        tl.max(most, axis=0),
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
    weight = _weights(threshold, peak, scale, log_min_p).to(tl.float64)
    before = num_equal * 0
    for block in tl.range(0, tl.cdiv(VOCAB, BLOCK), num_stages=2):
        exact = _adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
        weights = tl.where(exact > threshold, _weights(exact, peak, scale, log_min_p), 0.0)
        mass = tl.sum(tl.sum(weights, axis=1).to(tl.float64), axis=0)
        count = tl.sum(tl.sum((exact == threshold).to(tl.int32), axis=1), axis=0)
        num_kept = tl.minimum(tl.maximum(num_equal - before, 0), count)
        masses = tl.where(blocks == block, mass + num_kept.to(tl.float64) * weight, masses)
        equals = tl.where(blocks == block, count, equals)
        before += count
    return masses, equals


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
    """The first token whose weight, with all before it, exceeds uniform times the whole; never one of weight 0."""
    blocks, groups = tl.arange(0, NUM_BLOCKS), tl.arange(0, BLOCK // INNER)
    block, part = _place(blocks, masses, uniform * tl.sum(masses, axis=0))
    exact = _adjusted(row, block * BLOCK, VOCAB, BLOCK, INNER)
    weights = _weights(exact, peak, scale, log_min_p)
    is_equal = (exact == threshold).to(tl.int32)
    of_group = tl.sum(is_equal, axis=1)
    before = tl.sum(tl.where(blocks < block, equals, 0), axis=0) + tl.cumsum(of_group, axis=0) - of_group
    rank = before[:, None] + tl.cumsum(is_equal, axis=1) - is_equal
    weights = tl.where((exact > threshold) | ((is_equal > 0) & (rank < num_equal)), weights, 0.0)
    of_group = tl.sum(weights, axis=1).to(tl.float64)
    # Summed anew, the weight of the block may differ in its last bits.
    group, part = _place(groups, of_group, part * tl.sum(of_group, axis=0))
    inner = tl.sum(tl.where(groups[:, None] == group, weights, 0.0), axis=0).to(tl.float64)
    column, _ = _place(tl.arange(0, INNER), inner, part * tl.sum(inner, axis=0))
    return block * BLOCK + group * INNER + column


@triton.jit
def _place(places: tl.tensor, weights: tl.tensor, target: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first place whose weight with all before it exceeds the target, and the part of its weight below the target.

    Sums are float64. Where rounding puts the target at the whole, it is the last place that has a weight.
    """
    sums = tl.cumsum(weights, axis=0)
    last = tl.max(tl.where(weights > 0, places, 0), axis=0)
    place = tl.min(tl.where((sums > target) & (weights > 0), places, last), axis=0)
    weight = tl.sum(tl.where(places == place, weights, 0.0), axis=0)
    before = tl.sum(tl.where(places == place, sums - weights, 0.0), axis=0)
    part = (target - before) / tl.where(weight > 0, weight, 1.0)
    return place, tl.minimum(tl.maximum(part, 0.0), 1.0)


@triton.jit
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """`sample.uniform`."""
    mixed = _mix(_mix(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64) * 0x9E3779B97F4A7C15)
    return (mixed >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
