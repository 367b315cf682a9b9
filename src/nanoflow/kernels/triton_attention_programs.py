"""The Triton programs of paged attention; `triton_attention.py` divides the work among them.

Each is one loop over blocks of keys with a running softmax (FlashAttention-2), the keys found through the page table.
They know of tensors and lengths only, not of operations or batches. A tile has a power of two of columns, BLOCK_D; of a
head whose size D is less, the last columns are 0.

Shape legend: B decodes, R prefill requests, H heads, K KV heads, D head size, N pages of G tokens, P pages of a table.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels.triton_kv_fp8 import in_float16, load_scales, widened

_LOG2_E = tl.constexpr(1.4426950408889634)
# log2 of the largest weight in float16, about, and of the weight of a sink beside such weights.
_LARGEST_WEIGHT, _SINK_WEIGHT = tl.constexpr(14.0), tl.constexpr(40.0)


@triton.jit
def _begin(
    sinks: tl.tensor | None,
    heads: tl.tensor,
    has_sink: tl.tensor,
    scales: tl.tensor | None,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state of `_attend` before any key, with the sinks of those heads that have one now.

    A sink, of `sinks` [H], is a logit that stands for no key. Of several parts of a context the first alone has it.
    With `scales` weights are large numbers of float16, and the peak of a sink must not make them small.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total, peak = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], -1e30, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=has_sink, other=0.0) * _LOG2_E
        weight = 0.0 if scales is None else _SINK_WEIGHT
        total, peak = tl.where(has_sink, tl.exp2(weight), total), tl.where(has_sink, sink - weight, peak)
    return acc, total, peak


@triton.jit
def _for_products(
    queries: tl.tensor, scales: tl.tensor | None, log2_scale: float, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Queries, and the factor that makes base-2 scores of their products with keys: one for all, in 8 bits for each."""
    if scales is None:
        return queries, log2_scale
    elif queries.dtype == tl.float32:  # noqa: RET505  (Triton compiles one of the branches)
        return queries, tl.full([BLOCK_M], 1.0, tl.float32) * log2_scale
    else:
        narrow, powers = in_float16(queries)
        return narrow, powers * log2_scale


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    q: tl.tensor,
    query_places: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor | None,
    table: tl.tensor,
    kv_head: tl.tensor,
    factors: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add keys start..stop-1 to running softmaxes in base 2: weighted sum of values, sum of weights, largest score.

    Without IS_MASKED every query sees every key, and start..stop is a number of whole blocks. Queries and factors are
    those of `_for_products`. Keys and values in 8 bits become numbers of the queries' type before the products, which
    sum in float32; weights are then relative to the values' scales too, so that the largest fills that type.
    """
    columns = factors if scales is None else factors[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    for block in range(start, stop, BLOCK_N):
        places = block + tl.arange(0, BLOCK_N)
        exists = places < stop
        pages = tl.load(table + tl.minimum(places, stop - 1) // PAGE_SIZE).to(tl.int64)
        rows = (pages * KV_HEADS + kv_head) * PAGE_SIZE + places % PAGE_SIZE
        cells = rows[:, None] * HEAD_DIM + dims
        key = _load_rows(keys + cells, exists, dims, HEAD_DIM, BLOCK_D, IS_MASKED)
        scores = tl.dot(q, tl.trans(widened(key, q.dtype)), input_precision="ieee")
        above = 0.0
        if scales is not None:
            key_scales, value_scales, largest = load_scales(scales + rows, exists, IS_MASKED)
            scores *= key_scales[None, :]
            above = largest - _LARGEST_WEIGHT
        if IS_MASKED:
            visible = (places[None, :] <= query_places[:, None]) & exists[None, :]
            if WINDOW is not None:
                visible &= places[None, :] > query_places[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factors + above)
        weights = tl.exp2(scores * columns - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        value = _load_rows(values + cells, exists, dims, HEAD_DIM, BLOCK_D, IS_MASKED)
        scaled = weights
        if scales is not None:
            scaled = weights * value_scales[None, :]
        acc = tl.dot(scaled.to(q.dtype), widened(value, q.dtype), acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
    return acc, total, peak


@triton.jit
def _load_rows(
    cells: tl.tensor,
    exists: tl.tensor,
    dims: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_MASKED: tl.constexpr,
) -> tl.tensor:
    """Rows that exist; 0 for others: behind a context stands anything, and a weight of 0 does not keep out its NaN."""
    if IS_MASKED:
        return tl.load(cells, mask=exists[:, None] & (dims < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:  # noqa: RET505  (Triton compiles one of the branches)
        return tl.load(cells, mask=dims < HEAD_DIM, other=0.0)
    else:
        return tl.load(cells)


@triton.jit(do_not_specialize=["table_stride", "first_request"])
def decode_program(
    out: tl.tensor,
    log_sums: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor | None,
    page_tables: tl.tensor,
    sinks: tl.tensor | None,
    context_len: tl.tensor,
    table_stride: int,
    first_request: int,
    log2_scale: float,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One part of one request's context, for the query heads of one KV head; out is [B, H, parts, D]."""
    kv_head, row, split, num_splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    context = tl.load(context_len + first_request + row)
    if context == 0:
        return
    # Exactly: what stands before a window may not be finite.
    first = 0 * context if WINDOW is None else tl.maximum(context - WINDOW, 0)
    part = tl.maximum(tl.cdiv(tl.cdiv(context - first, num_splits), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    start = first + split * part
    stop = tl.minimum(start + part, context)
    heads, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    # Query heads that share a KV head are the rows of a product, filled up to the tensor cores' smallest.
    is_head = heads < GROUP
    is_cell = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    head_rows = (row * KV_HEADS + kv_head).to(tl.int64) * GROUP + heads
    queries = tl.load(q + head_rows[:, None] * HEAD_DIM + dims[None, :], mask=is_cell, other=0.0)
    queries, factors = _for_products(queries, scales, log2_scale, BLOCK_M)
    table = page_tables + (first_request + row).to(tl.int64) * table_stride
    place = tl.zeros([BLOCK_M], tl.int32) + context - 1
    acc, total, peak = _begin(sinks, kv_head * GROUP + heads, is_head & (split == 0), scales, BLOCK_M, BLOCK_D)
    if WINDOW is None:
        whole = tl.maximum(stop // BLOCK_N * BLOCK_N, start)
        acc, total, peak = _attend(
            acc, total, peak, queries, place, start, whole, keys, values, scales, table, kv_head, factors,
            KV_HEADS, HEAD_DIM, BLOCK_D, PAGE_SIZE, None, BLOCK_N, False,
        )  # fmt: skip
        start = whole
    acc, total, peak = _attend(
        acc, total, peak, queries, place, start, stop, keys, values, scales, table, kv_head, factors,
        KV_HEADS, HEAD_DIM, BLOCK_D, PAGE_SIZE, WINDOW, BLOCK_N, True,
    )  # fmt: skip
    parts = head_rows * num_splits + split
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + parts[:, None] * HEAD_DIM + dims[None, :], mean.to(out.dtype.element_ty), mask=is_cell)
    if IS_SPLIT:
        tl.store(log_sums + parts, peak + tl.log2(total), mask=is_head)


@triton.jit(do_not_specialize=["first_request"])
def merge_program(
    out: tl.tensor,
    parts: tl.tensor,
    log_sums: tl.tensor,
    context_len: tl.tensor,
    first_request: int,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
) -> None:
    """Mean of the parts [NUM_SPLITS, D] of one row and head, each with weight 2^log_sum, which is 0 for empty parts."""
    head_row = tl.program_id(0).to(tl.int64)
    if tl.load(context_len + first_request + head_row // NUM_HEADS) == 0:
        return
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    logs = tl.load(log_sums + head_row * NUM_SPLITS + splits)
    weights = tl.exp2(logs - tl.max(logs, 0))
    cells = (head_row * NUM_SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :]
    each = tl.load(parts + cells, mask=is_dim[None, :], other=0.0)
    mean = tl.sum(each * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head_row * HEAD_DIM + dims, mean.to(out.dtype.element_ty), mask=is_dim)


@triton.jit
def _find_request(
    query_start: tl.tensor,
    num_requests: int,
    first_token: int,
    stop_token: int,
    tile: tl.tensor,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """The request that a tile of queries belongs to; -1 if the range begins with tokens of no request.

    A request that begins at row s of the range gets tiles from s // BLOCK_M + (number of requests before it) on. These
    are as many as it can need, whatever the other lengths. So its number is the number of requests that begin at or
    before the tile, minus 1.
    """
    found = 0 * tile
    for base in range(0, num_requests, 128):
        requests = base + tl.arange(0, 128)
        starts = tl.load(query_start + requests, mask=requests < num_requests, other=0)
        rows = tl.minimum(tl.maximum(starts, first_token), stop_token) - first_token
        begins = (rows // BLOCK_M + requests <= tile) & (requests < num_requests)
        found += tl.sum(begins.to(tl.int32), 0)
    return found - 1


@triton.jit(do_not_specialize=["table_stride", "num_requests", "first_token", "stop_token"])
def prefill_program(
    out: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor | None,
    page_tables: tl.tensor,
    sinks: tl.tensor | None,
    query_start: tl.tensor,
    context_len: tl.tensor,
    table_stride: int,
    num_requests: int,
    first_token: int,
    stop_token: int,
    log2_scale: float,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One head of up to BLOCK_M queries of one request; tiles that no request needs end at once."""
    # Last tiles first: they have the most keys, and short ones then fill the gaps at the end.
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    request = _find_request(query_start, num_requests, first_token, stop_token, tile, BLOCK_M)
    if request < 0:
        return
    chunk_stop = tl.load(query_start + request + 1)
    begin = tl.maximum(tl.load(query_start + request), first_token)
    end = tl.minimum(chunk_stop, stop_token)
    tile_of_request = tile - (tl.minimum(begin, stop_token) - first_token) // BLOCK_M - request
    token = begin + tile_of_request * BLOCK_M
    context = tl.load(context_len + request)
    if (token >= end) | (context == 0):
        return
    tokens = token + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    cells = ((tokens - first_token).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    is_cell = (tokens < end)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + cells, mask=is_cell, other=0.0)
    queries, factors = _for_products(queries, scales, log2_scale, BLOCK_M)
    # A token's place in its sequence is `offset` on from its place in the batch.
    offset = context - chunk_stop
    stop = tl.maximum(tl.minimum(token + BLOCK_M, end) + offset, 0)
    table = page_tables + request.to(tl.int64) * table_stride
    kv_head = head // (NUM_HEADS // KV_HEADS)
    acc, total, peak = _begin(sinks, tl.full([BLOCK_M], 0, tl.int32) + head, tokens < end, scales, BLOCK_M, BLOCK_D)
    if WINDOW is None:
        start = tl.maximum(token + offset + 1, 0) // BLOCK_N * BLOCK_N
        acc, total, peak = _attend(
            acc, total, peak, queries, tokens + offset, 0, start, keys, values, scales, table, kv_head, factors,
            KV_HEADS, HEAD_DIM, BLOCK_D, PAGE_SIZE, None, BLOCK_N, False,
        )  # fmt: skip
    else:
        # The first key that the first query sees: what stands before may not be a finite number.
        start = tl.maximum(token + offset - WINDOW + 1, 0)
    acc, total, peak = _attend(
        acc, total, peak, queries, tokens + offset, start, stop, keys, values, scales, table, kv_head, factors,
        KV_HEADS, HEAD_DIM, BLOCK_D, PAGE_SIZE, WINDOW, BLOCK_N, True,
    )  # fmt: skip
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + cells, mean.to(out.dtype.element_ty), mask=is_cell)
