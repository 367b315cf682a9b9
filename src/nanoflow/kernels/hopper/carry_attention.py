"""Decode attention in the steps that a product's program leaves for it, in Gluon for Hopper (`carry_programs.py`).

This file assigns runs of blocks of keys to warpgroups, loads blocks, and computes scores, weights and sums. The softmax
runs over the blocks of one head of one request after the other, as in `attention_programs.py`.

Shape legend: B rows that may be decodes, K KV heads, D head size, P pages of a table.

Gluon checks fields of an aggregate against their annotations, so these must be classes, not strings.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from nanoflow.kernels.hopper.attention_programs import (
    MAX_GROUP,
    PAGE_TOKENS,
    PANEL,
    Memory,
    Results,
    Sums,
    close_head,
)
from nanoflow.kernels.hopper.rings import Ring
from nanoflow.kernels.hopper.walk import Cursor, Rows
from nanoflow.kernels.launch import SHARES

# Number of computing warpgroups.
PARTS = 2
_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PAGE: gl.constexpr = gl.constexpr(PAGE_TOKENS)
_PANEL: gl.constexpr = gl.constexpr(PANEL)
_PARTS: gl.constexpr = gl.constexpr(PARTS)
_SHARES: gl.constexpr = gl.constexpr(SHARES)


@aggregate
class Attention:
    """One warpgroup's part of an attention.

    Attributes:
        memory: Slots of queries and keys, and of values.
        key_ring, value_ring: The rings of these slots.
        rows: Rows of the launch.
        log2_scale: Factor on scores.
        begin: First block of keys of this warpgroup's run.
        num_blocks: Number of blocks of the run.
        results: Outputs.
        PANELS: Panels of a head's dimensions.
    """

    memory: Memory
    key_ring: Ring
    value_ring: Ring
    rows: Rows
    log2_scale: gl.tensor
    begin: Cursor
    num_blocks: gl.tensor
    results: Results
    PANELS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, memory, key_ring, value_ring, rows, log2_scale, begin, num_blocks, results, PANELS):
        self.memory, self.key_ring, self.value_ring, self.rows = memory, key_ring, value_ring, rows
        self.log2_scale, self.begin, self.num_blocks, self.results = log2_scale, begin, num_blocks, results
        self.PANELS = gl.constexpr(PANELS)

    @gluon.jit
    def is_first(self, cursor, done):
        """Whether a block is this run's first block of its head; `done` blocks came before it."""
        return (cursor.block == 0) | (done == 0)

    @gluon.jit
    def issue_scores(self, done, mma: gl.constexpr):
        """Start keys x queries [BLOCK, GROUP] when the keys are loaded; it is still running when this returns."""
        products = gl.zeros([self.rows.BLOCK, _GROUP], gl.float32, mma)
        slot = done % self.key_ring.STAGES
        self.key_ring.wait(done)
        for panel in gl.static_range(self.PANELS):
            queries = self.memory.queries.index(slot * self.PANELS + panel).permute((1, 0))
            keys = self.memory.keys.index(slot * self.PANELS + panel)
            products = warpgroup_mma(keys, queries, products, use_acc=panel > 0, is_async=True)
        return products

    @gluon.jit
    def weigh(self, products, sums, is_first, cursor, mma: gl.constexpr):
        """Write the weights of a block, relative to the new peak, to shared memory, and rescale the sums so far."""
        scores = products * self.log2_scale
        if cursor.is_partial(self.rows):
            scores = gl.where(cursor.exists(self.rows, gl.SliceLayout(1, mma))[:, None], scores, float("-inf"))
        old = gl.where(is_first, -1e30, sums.peak)
        peak = gl.maximum(old, gl.max(scores, 0))
        decay = gl.exp2(old - peak)
        weights = gl.exp2(scores - peak[None, :])
        # At the first block of a head the old sums are those of another head.
        total = gl.where(is_first, weights, sums.total * decay[None, :] + weights)
        self.memory.weights.permute((1, 0)).store(weights.to(self.memory.weights.dtype))
        fence_async_shared()
        return Sums(peak, total, sums.low * decay[None, :], sums.high * decay[None, :])

    @gluon.jit
    def issue_sums(self, sums, is_first, cursor, done):
        """Start adding values^T x weights to both panels of the sums; it is still running when this returns."""
        slot = done % self.value_ring.STAGES
        self.value_ring.wait(done)
        if cursor.is_partial(self.rows):
            # Slots after a context may be NaN, and 0 times NaN is NaN.
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            exists = cursor.exists(self.rows, gl.SliceLayout(1, layout))
            for panel in gl.static_range(self.PANELS):
                tile = self.memory.values.index(slot * self.PANELS + panel)
                tile.store(gl.where(exists[:, None], tile.load(layout), 0.0))
            fence_async_shared()
        weights = self.memory.weights.permute((1, 0))
        values = self.memory.values.index(slot * self.PANELS).permute((1, 0))
        low, high = warpgroup_mma(values, weights, sums.low, use_acc=is_first == 0, is_async=True), sums.high
        if self.PANELS == 2:
            values = self.memory.values.index(slot * self.PANELS + 1).permute((1, 0))
            high = warpgroup_mma(values, weights, high, use_acc=is_first == 0, is_async=True)
        return low, high

    @gluon.jit
    def end_block(self, sums, cursor, done, mma: gl.constexpr):
        """Write the result if a head or the run ends with this block; returns the next block."""
        is_last = cursor.ends_head(self.rows)
        if is_last | (done + 1 == self.num_blocks):
            # The run has the beginning of the head if it started at or before the head's block 0.
            close_head(self.results, sums, cursor, self.rows, is_last, done >= cursor.block, self.PANELS, mma)
        return cursor.next(self.rows)

    @gluon.jit
    def do_block(self, sums, cursor, done, mma: gl.constexpr):
        """All steps of a block, while nothing else runs; returns the sums and the next block."""
        is_first = self.is_first(cursor, done)
        products = warpgroup_mma_wait(0, deps=[self.issue_scores(done, mma)])
        self.key_ring.release(done)
        sums = self.weigh(products, sums, is_first, cursor, mma)
        low, high = self.issue_sums(sums, is_first, cursor, done)
        low, high = warpgroup_mma_wait(0, deps=[low, high])
        self.value_ring.release(done)
        sums = Sums(sums.peak, sums.total, low, high)
        return sums, self.end_block(sums, cursor, done, mma)


@gluon.jit
def make_memories(dtype: gl.constexpr, STAGES: gl.constexpr, PANELS: gl.constexpr, BLOCK: gl.constexpr):
    """Shared memory of both warpgroups."""
    keys0, keys1 = _two_tiles(dtype, [STAGES * PANELS, BLOCK, _PANEL])
    values0, values1 = _two_tiles(dtype, [STAGES * PANELS, BLOCK, _PANEL])
    queries0, queries1 = _two_tiles(dtype, [STAGES * PANELS, _GROUP, _PANEL])
    weights0, weights1 = _two_tiles(dtype, [_GROUP, BLOCK])
    return Memory(queries0, keys0, values0, weights0), Memory(queries1, keys1, values1, weights1)


@gluon.jit
def _two_tiles(dtype: gl.constexpr, shape: gl.constexpr):
    """One tile for each of the two warpgroups."""
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    first = gl.allocate_shared_memory(dtype, shape, tile)
    return first, gl.allocate_shared_memory(dtype, shape, tile)


@gluon.jit
def _run(which, num_programs, num_tiles, num_rounds, extra, num_blocks):
    """The first block of a warpgroup's run, and its number of blocks.

    The first programs may have one tile more than the others. The warpgroups of the others get up to `extra` more
    blocks for it. That number is reduced by half a block for each block in their rounds, because those blocks are
    cheap.
    """
    num_busy = num_tiles % num_programs
    num_idle = _PARTS * (num_programs - num_busy)
    beside = num_blocks // (_PARTS * num_programs) - num_tiles // num_programs * num_rounds
    extra -= gl.minimum(gl.maximum(beside, 0), num_rounds) // 2
    extra = gl.where(num_busy > 0, gl.minimum(gl.maximum(extra, 0), gl.cdiv(num_blocks, num_idle)), 0)
    # The remaining blocks are shared evenly; the first warpgroups take one more each until none is left.
    rest = gl.maximum(num_blocks - num_idle * extra, 0)
    per, more = rest // (_PARTS * num_programs), rest % (_PARTS * num_programs)
    idle_before = gl.maximum(which - _PARTS * num_busy, 0)
    is_idle = which >= _PARTS * num_busy
    begin = gl.minimum(which * per + gl.minimum(which, more) + idle_before * extra, num_blocks)
    count = per + gl.where(which < more, 1, 0) + gl.where(is_idle, extra, 0)
    stop = gl.minimum(begin + count, num_blocks)
    return begin, stop - begin


@gluon.jit
def begin_run(
    begins, which, run, num_programs, num_tiles, num_rounds, extra, share_begin, share_until, rows, SCAN: gl.constexpr
):  # fmt: skip
    """The run of blocks of a warpgroup within a launch's share: its first block, and its number of blocks."""
    base = rows.base()
    total = rows.num_blocks(base)
    first = (total.to(gl.int64) * share_begin // _SHARES).to(gl.int32)
    last = (total.to(gl.int64) * share_until // _SHARES).to(gl.int32)
    begin, count = _run(which, num_programs, num_tiles, num_rounds, extra, last - first)
    begin += first
    gl.store(begins + run * (_PARTS * num_programs) + which, begin)
    return rows.find(begin, base, SCAN, 4), count


@gluon.jit
def load_blocks(q, keys, values, attention, page_tables, table_stride):
    """Fill the rings of one warpgroup's attention. Queries come with the keys: always eight rows, even of other heads.

    For pages beyond the context the last page is loaded again, so every slot gets the same number of bytes.
    """
    rows, memory, cursor = attention.rows, attention.memory, attention.begin
    PAGES: gl.constexpr = rows.BLOCK // _PAGE
    BYTES: gl.constexpr = attention.PANELS * _PANEL * 2
    for count in range(attention.num_blocks):
        slot = count % attention.key_ring.STAGES
        # 1. All page numbers, before any wait, which hides their latency.
        table = page_tables + (rows.first_row + cursor.row) * table_stride
        last, at = (cursor.context - 1) // _PAGE, cursor.block * PAGES
        page0, page1 = gl.load(table + at), gl.load(table + gl.minimum(at + 1, last))
        page2, page3 = gl.load(table + gl.minimum(at + 2, last)), gl.load(table + gl.minimum(at + 3, last))
        pages = (page0, page1, page2, page3)
        # 2. Keys and queries.
        bar = attention.key_ring.expect(count, (rows.BLOCK + _GROUP) * BYTES)
        for panel in gl.static_range(attention.PANELS):
            cell = [(cursor.row * rows.KV_HEADS + cursor.head) * attention.results.GROUP, panel * _PANEL]
            tile = memory.queries.index(slot * attention.PANELS + panel)
            tma.async_copy_global_to_shared(q, cell, bar, tile)
        _load_pages(keys, memory.keys, bar, slot, pages, cursor.head, rows.KV_HEADS, attention.PANELS)
        # 3. Values.
        bar = attention.value_ring.expect(count, rows.BLOCK * BYTES)
        _load_pages(values, memory.values, bar, slot, pages, cursor.head, rows.KV_HEADS, attention.PANELS)
        cursor = cursor.next(rows)


@gluon.jit
def _load_pages(cells, tiles, bar, slot, pages, head, KV_HEADS: gl.constexpr, PANELS: gl.constexpr):
    """Load one head of four pages, in panels of its dimensions."""
    for i in gl.static_range(4):
        at = (pages[i] * KV_HEADS + head) * _PAGE
        for panel in gl.static_range(PANELS):
            tile = tiles.index(slot * PANELS + panel).slice(i * _PAGE, _PAGE)
            tma.async_copy_global_to_shared(cells, [at, panel * _PANEL], bar, tile)
