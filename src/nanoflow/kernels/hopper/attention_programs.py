"""The Gluon program of decode attention on Hopper; `attention.py` divides the work.

One warp issues loads and a warpgroup computes; barriers in shared memory say which slot of the ring is full or empty.
Scores are keys x queries, and the result is dimensions x queries. So the 64 rows of the tensor cores are filled with
keys, then with dimensions, and the few queries of a KV head are columns: eight, the minimum. The parts that
`carry_attention.py` (attention in a product's program) shares are here too: memory, sums, and the end of a head.

Shape legend: B rows that may be decodes, K KV heads, D head size, N pages of G tokens, P pages of a table.

Gluon checks fields of an aggregate against their annotations, so these must be classes, not strings.
"""

# mypy: ignore-errors

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from nanoflow.kernels.hopper.loads import PAGE_TOKENS as PAGE_TOKENS
from nanoflow.kernels.hopper.loads import fill_ring
from nanoflow.kernels.hopper.rings import make_ring
from nanoflow.kernels.hopper.walk import Rows, run_of_program

# Most query heads of a KV head; dimensions of a row in shared memory, which TMA swizzles.
MAX_GROUP, PANEL = 8, 64
_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PANEL: gl.constexpr = gl.constexpr(PANEL)
_LOG2_E: gl.constexpr = gl.constexpr(math.log2(math.e))


@aggregate
class Memory:
    """Shared memory of an attention, 16-bit, in panels of dimensions.

    Attributes:
        queries: [slots x panels, MAX_GROUP, PANEL].
        keys, values: [slots x panels, BLOCK, PANEL].
        weights: [MAX_GROUP, BLOCK], softmax weights of one block of keys for each query.
    """

    queries: gl.shared_memory_descriptor
    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, queries, keys, values, weights):
        self.queries, self.keys, self.values, self.weights = queries, keys, values, weights


@aggregate
class Results:
    """The outputs of an attention.

    Attributes:
        out: [B, K x GROUP, D], for heads whose blocks are all in this run.
        parts: float32 [2 S, MAX_GROUP, D], for other heads: mean values over a run's part of the head; S is the number
        of runs.
        log_sums: float32 [2 S, MAX_GROUP], log2 of the sums of weights of these parts.
        run: Number of this run.
        GROUP: Query heads of a KV head.
    """

    out: gl.tensor
    parts: gl.tensor
    log_sums: gl.tensor
    run: gl.tensor
    GROUP: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, out, parts, log_sums, run, GROUP):
        self.out, self.parts, self.log_sums, self.run = out, parts, log_sums, run
        self.GROUP = gl.constexpr(GROUP)


@aggregate
class Sums:
    """A running softmax over the blocks of keys of one head.

    peak: [MAX_GROUP], the largest score so far.
    total: [BLOCK, MAX_GROUP], weights relative to the peak, summed over blocks for each position in a block.
    low, high: [PANEL, MAX_GROUP], sums of weighted values, one for each panel of dimensions.
    """

    peak: gl.tensor
    total: gl.tensor
    low: gl.tensor
    high: gl.tensor

    @gluon.constexpr_function
    def __init__(self, peak, total, low, high):
        self.peak, self.total, self.low, self.high = peak, total, low, high


@gluon.jit
def _make_memory(dtype: gl.constexpr, STAGES: gl.constexpr, PANELS: gl.constexpr, BLOCK: gl.constexpr):
    """Memory for the queries of one head and STAGES slots of keys and values."""
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = gl.allocate_shared_memory(dtype, [STAGES * PANELS, BLOCK, _PANEL], tile)
    values = gl.allocate_shared_memory(dtype, [STAGES * PANELS, BLOCK, _PANEL], tile)
    queries = gl.allocate_shared_memory(dtype, [PANELS, _GROUP, _PANEL], tile)
    weights = gl.allocate_shared_memory(dtype, [_GROUP, BLOCK], tile)
    return Memory(queries, keys, values, weights)


@gluon.jit
def no_sums(LOWEST: gl.constexpr, BLOCK: gl.constexpr, mma: gl.constexpr):
    """Sums over no keys; LOWEST is below every score."""
    return Sums(
        gl.full([_GROUP], LOWEST, gl.float32, gl.SliceLayout(0, mma)),
        gl.zeros([BLOCK, _GROUP], gl.float32, mma),
        gl.zeros([_PANEL, _GROUP], gl.float32, mma),
        gl.zeros([_PANEL, _GROUP], gl.float32, mma),
    )


@gluon.jit
def with_sink(sums, sinks, cursor, GROUP: gl.constexpr, has_begin, mma: gl.constexpr):
    """Add the weights of the sinks of a head's queries to the sums; `has_begin` says whether they are this run's.

    A sink, of `sinks` [K x GROUP] or None, is a logit that stands for no key. The run with the first block has it.
    """
    if sinks is None:
        return sums
    else:  # noqa: RET505  (Triton compiles one of the branches)
        heads = gl.arange(0, _GROUP, gl.SliceLayout(0, mma))
        sink = gl.load(sinks + cursor.head * GROUP + heads, mask=heads < GROUP, other=0.0).to(gl.float32)
        # The bound keeps a sum finite; what is left of the keys is nothing long before.
        weight = gl.exp2(gl.minimum(sink * _LOG2_E - sums.peak, 100.0))
        is_first = gl.arange(0, sums.total.shape[0], gl.SliceLayout(1, mma)) == 0
        total = sums.total + is_first.to(gl.float32)[:, None] * weight[None, :]
        total = gl.where(has_begin, total, sums.total)
        return Sums(sums.peak, total, sums.low, sums.high)


@gluon.jit
def close_head(results, sums, cursor, rows, is_last, has_begin, PANELS: gl.constexpr, mma: gl.constexpr):
    """Write the result of a head, or this run's part of it.

    `is_last` says whether the head ends here (otherwise the run does); `has_begin` whether the run has its first block.
    """
    denominators = gl.sum(sums.total, 0)
    write_dims(results, sums.low, denominators, cursor, rows, is_last, has_begin, 0, PANELS * _PANEL, mma)
    if PANELS == 2:
        write_dims(results, sums.high, denominators, cursor, rows, is_last, has_begin, _PANEL, PANELS * _PANEL, mma)
    write_log_sums(results, sums.peak + gl.log2(denominators), is_last, has_begin, mma)


@gluon.jit
def write_dims(
    results, values, denominators, cursor, rows, is_last, has_begin,
    FIRST: gl.constexpr, HEAD_DIM: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Write sums of weighted values [dimensions, MAX_GROUP] over their denominators; FIRST is the first dimension."""
    heads = gl.arange(0, _GROUP, gl.SliceLayout(0, layout))
    dims = FIRST + gl.arange(0, values.shape[0], gl.SliceLayout(1, layout))
    means = values / denominators[None, :]
    if is_last & has_begin:
        first = (cursor.row * rows.KV_HEADS + cursor.head) * results.GROUP
        cells = (first + heads)[None, :] * HEAD_DIM + dims[:, None]
        gl.store(results.out + cells, means.to(results.out.dtype.element_ty), mask=(heads < results.GROUP)[None, :])
    else:
        cells = (_part_of(results, has_begin) * _GROUP + heads)[None, :] * HEAD_DIM + dims[:, None]
        gl.store(results.parts + cells, means)


@gluon.jit
def write_log_sums(results, log_sums, is_last, has_begin, layout: gl.constexpr):
    """Write log2 of the sums of weights [MAX_GROUP] of a part of a head; of a whole head nobody needs them."""
    heads = gl.arange(0, _GROUP, gl.SliceLayout(0, layout))
    if (is_last & has_begin) == 0:
        gl.store(results.log_sums + _part_of(results, has_begin) * _GROUP + heads, log_sums)


@gluon.jit
def _part_of(results, has_begin):
    """Entry of a part: this run's odd one if the part has the beginning of its head, else the even one."""
    place = 2 * results.run
    if has_begin:
        place += 1
    return place


@gluon.jit
def _attend(
    results, sinks, q, memory, ring, rows, cursor, num_steps, log2_scale, PANELS: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Consume the ring: a running softmax over the blocks of one head of one request after the other."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, _GROUP, 16]
    )
    sums = no_sums(-1e30, rows.BLOCK, mma)
    is_new = num_steps > 0
    # The addition makes `first_block` a separate variable: the compiler would take a plain copy for an alias of
    # `block`.
    first_block = cursor.block + 0 * num_steps
    for step in range(num_steps):
        slot = step % ring.STAGES
        # 1. Load queries for a new head or request.
        if is_new:
            _load_queries(q, memory.queries, results.GROUP, rows, cursor, PANELS, WARPS)
            sums = no_sums(-1e30, rows.BLOCK, mma)
            first_block = cursor.block + 0 * step
        # 2. Scores.
        ring.wait(step)
        products = gl.zeros([rows.BLOCK, _GROUP], gl.float32, mma)
        for panel in gl.static_range(PANELS):
            queries = memory.queries.index(panel).permute((1, 0))
            products = warpgroup_mma(memory.keys.index(slot * PANELS + panel), queries, products, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[products]) * log2_scale
        is_last = cursor.ends_head(rows)
        if cursor.is_partial(rows):
            scores = gl.where(cursor.exists(rows, gl.SliceLayout(1, mma))[:, None], scores, float("-inf"))
            _clear_missing(memory.values, slot, rows, cursor, PANELS, WARPS)
        # 3. Running softmax and values.
        sums = _with_block(sums, scores, memory, slot, PANELS)
        ring.release(step)
        # 4. Write the result if the head or this run ends.
        is_new = is_last
        if is_last | (step + 1 == num_steps):
            sums = with_sink(sums, sinks, cursor, results.GROUP, first_block == 0, mma)
            close_head(results, sums, cursor, rows, is_last, first_block == 0, PANELS, mma)
        cursor = cursor.next(rows)


@gluon.jit
def _load_queries(q, tiles, GROUP: gl.constexpr, rows, cursor, PANELS: gl.constexpr, WARPS: gl.constexpr):
    """Load the queries of one KV head of one row into shared memory; missing ones are zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
    heads = gl.arange(0, _GROUP, gl.SliceLayout(1, layout))
    dims = gl.arange(0, _PANEL, gl.SliceLayout(0, layout))
    first = (cursor.row * rows.KV_HEADS + cursor.head) * GROUP
    for panel in gl.static_range(PANELS):
        cells = (first + heads)[:, None] * (PANELS * _PANEL) + panel * _PANEL + dims[None, :]
        tiles.index(panel).store(gl.load(q + cells, mask=(heads < GROUP)[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def _clear_missing(tiles, slot, rows, cursor, PANELS: gl.constexpr, WARPS: gl.constexpr):
    """Zero the slots after a context: they may be NaN, and 0 times NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    exists = cursor.exists(rows, gl.SliceLayout(1, layout))
    for panel in gl.static_range(PANELS):
        tile = tiles.index(slot * PANELS + panel)
        tile.store(gl.where(exists[:, None], tile.load(layout), 0.0))


@gluon.jit
def _with_block(sums, scores, memory, slot, PANELS: gl.constexpr):
    """Add a block of keys with these scores to the sums; its values have been read when this returns."""
    peak = gl.maximum(sums.peak, gl.max(scores, 0))
    weights = gl.exp2(scores - peak[None, :])
    decay = gl.exp2(sums.peak - peak)
    total = sums.total * decay[None, :] + weights
    tile = memory.weights.permute((1, 0))
    tile.store(weights.to(memory.weights.dtype))
    fence_async_shared()
    values = memory.values.index(slot * PANELS).permute((1, 0))
    low, high = warpgroup_mma(values, tile, sums.low * decay[None, :], is_async=True), sums.high
    if PANELS == 2:
        values = memory.values.index(slot * PANELS + 1).permute((1, 0))
        high = warpgroup_mma(values, tile, high * decay[None, :], is_async=True)
        low, high = warpgroup_mma_wait(0, deps=[low, high])
    else:
        low = warpgroup_mma_wait(0, deps=[low])
    return Sums(peak, total, low, high)


@gluon.jit(do_not_specialize=["table_stride", "first_row", "num_rows"])
def decode_program(
    out, parts, log_sums, q, keys, values, page_tables, sinks, context_len, key_blocks, table_stride, first_row,
    num_rows, log2_scale,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SCAN: gl.constexpr, WARPS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """An equal run of the blocks of keys of all rows, ordered by row, head and block; out is [B, K x GROUP, D]."""
    PANELS: gl.constexpr = HEAD_DIM // _PANEL
    # 1. This program's run.
    rows = Rows(context_len, key_blocks, first_row, num_rows, KV_HEADS, BLOCK)
    cursor, num_steps = run_of_program(rows, SCAN, WARPS)
    # 2. A ring of keys and values between the loading warp and the computing warpgroup.
    memory = _make_memory(q.dtype.element_ty, STAGES, PANELS, BLOCK)
    ring = make_ring(STAGES)
    ring.init(1)
    fence_async_shared()
    results = Results(out, parts, log_sums, gl.program_id(0), GROUP)
    SLOT_BYTES: gl.constexpr = 4 * BLOCK * HEAD_DIM
    gl.warp_specialize(
        [
            (_attend, (results, sinks, q, memory, ring, rows, cursor, num_steps, log2_scale, PANELS, WARPS)),
            (
                fill_ring,
                (
                    keys, values, None, memory, ring, page_tables, table_stride, rows, cursor, num_steps,
                    PANELS, _PANEL, SLOT_BYTES,
                ),
            ),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip
