"""Decode attention in the steps that a product's program leaves it, in Gluon for Hopper: `carry_programs.py`.

Who has which run of blocks of keys, how they are loaded, and what is done with one: scores, weights, sums. The softmax
runs over the blocks of one head of one request after the other, as in `attention_programs.py`.

Shape legend: B rows with room for decodes, K KV heads, D head size, P pages a table.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS, PANEL, advance
from nanoflow.kernels.launch import KEY_BLOCK, SHARES

# Warpgroups that compute.
PARTS = 2
_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PAGE: gl.constexpr = gl.constexpr(PAGE_TOKENS)
_PANEL: gl.constexpr = gl.constexpr(PANEL)
_BLOCK: gl.constexpr = gl.constexpr(KEY_BLOCK)
_PARTS: gl.constexpr = gl.constexpr(PARTS)
_SHARES: gl.constexpr = gl.constexpr(SHARES)


@gluon.jit
def _run(which, num_programs, num_tiles, num_rounds, extra, num_blocks):
    """Of a warpgroup: where its run of so many blocks begins, and how long it is.

    The first programs may have a tile more than the others, whose warpgroups get up to `extra` blocks more for it: by
    half a block less for each block of the others that goes with a round of theirs, for that is cheap.
    """
    num_busy = num_tiles % num_programs
    num_idle = _PARTS * (num_programs - num_busy)
    beside = num_blocks // (_PARTS * num_programs) - num_tiles // num_programs * num_rounds
    extra -= gl.minimum(gl.maximum(beside, 0), num_rounds) // 2
    extra = gl.where(num_busy > 0, gl.minimum(gl.maximum(extra, 0), gl.cdiv(num_blocks, num_idle)), 0)
    # What is left is shared evenly; the first take one more each until it is gone.
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
    begins, which, run, num_programs, num_tiles, num_rounds, extra, share_begin, share_until, context_len, key_blocks,
    first_row, num_rows, KV_HEADS: gl.constexpr, SCAN: gl.constexpr,
):  # fmt: skip
    """The run of blocks of a warpgroup among a launch's share: where it begins, and how many they are."""
    base = gl.load(key_blocks + first_row)
    total = (gl.load(key_blocks + first_row + num_rows) - base) * KV_HEADS
    first = (total.to(gl.int64) * share_begin // _SHARES).to(gl.int32)
    last = (total.to(gl.int64) * share_until // _SHARES).to(gl.int32)
    begin, count = _run(which, num_programs, num_tiles, num_rounds, extra, last - first)
    begin += first
    gl.store(begins + run * (_PARTS * num_programs) + which, begin)
    # Its first row stands behind the rows whose blocks all come before.
    scan_layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    row = begin * 0
    for at in range(0, num_rows, SCAN):
        rows = at + gl.arange(0, SCAN, scan_layout)
        ends = gl.load(key_blocks + first_row + gl.minimum(rows, num_rows - 1) + 1)
        row += gl.sum((((ends - base) * KV_HEADS <= begin) & (rows < num_rows)).to(gl.int32), 0)
    row = gl.maximum(gl.minimum(row, num_rows - 1), 0)
    context = gl.load(context_len + first_row + row)
    within = begin - (gl.load(key_blocks + first_row + row) - base) * KV_HEADS
    blocks = gl.maximum(gl.cdiv(context, _BLOCK), 1)
    return row, within // blocks, within % blocks, context, count


@gluon.jit
def load_blocks(
    q, keys, values, query_ring, key_ring, value_ring, key_full, key_empty, value_full, value_empty, page_tables,
    table_stride, context_len, first_row, num_rows, row, head, block, context, num_blocks,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PANELS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings of one warpgroup's attention. Queries come with the keys, eight rows of them, if others' too.

    Pages beyond the context are the last one again: every slot gets the same number of bytes.
    """
    PAGES: gl.constexpr = _BLOCK // _PAGE
    for count in range(num_blocks):
        slot = count % STAGES
        parity = ((count // STAGES) & 1) ^ 1
        # 1. All page numbers, before any wait: memory answers meanwhile.
        table = page_tables + (first_row + row) * table_stride
        last, at = (context - 1) // _PAGE, block * PAGES
        page0, page1 = gl.load(table + at), gl.load(table + gl.minimum(at + 1, last))
        page2, page3 = gl.load(table + gl.minimum(at + 2, last)), gl.load(table + gl.minimum(at + 3, last))
        # 2. Keys and queries.
        mbarrier.wait(key_empty.index(slot), parity)
        bar = key_full.index(slot)
        mbarrier.expect(bar, (_BLOCK + _GROUP) * PANELS * _PANEL * 2)
        for panel in gl.static_range(PANELS):
            cell = [(row * KV_HEADS + head) * GROUP, panel * _PANEL]
            tma.async_copy_global_to_shared(q, cell, bar, query_ring.index(slot * PANELS + panel))
        _load_pages(keys, key_ring, bar, slot, page0, page1, page2, page3, head, KV_HEADS, PANELS)
        # 3. Values.
        mbarrier.wait(value_empty.index(slot), parity)
        bar = value_full.index(slot)
        mbarrier.expect(bar, _BLOCK * PANELS * _PANEL * 2)
        _load_pages(values, value_ring, bar, slot, page0, page1, page2, page3, head, KV_HEADS, PANELS)
        row, head, block, context = advance(
            row, head, block, context, context_len, first_row, num_rows, KV_HEADS, _BLOCK
        )


@gluon.jit
def _load_pages(cells, ring, bar, slot, page0, page1, page2, page3, head, KV_HEADS: gl.constexpr, PANELS: gl.constexpr):
    """One head of four pages, in panels of its dimensions."""
    pages = (page0, page1, page2, page3)
    for i in gl.static_range(4):
        at = (pages[i] * KV_HEADS + head) * _PAGE
        for panel in gl.static_range(PANELS):
            tile = ring.index(slot * PANELS + panel).slice(i * _PAGE, _PAGE)
            tma.async_copy_global_to_shared(cells, [at, panel * _PANEL], bar, tile)


@gluon.jit
def issue_scores(products, count, key_ring, query_ring, full, PANELS: gl.constexpr, STAGES: gl.constexpr):
    """products = keys x queries [BLOCK, GROUP], once the keys are there; under way when this returns."""
    slot = count % STAGES
    mbarrier.wait(full.index(slot), (count // STAGES) & 1)
    for panel in gl.static_range(PANELS):
        queries = query_ring.index(slot * PANELS + panel).permute((1, 0))
        products = warpgroup_mma(
            key_ring.index(slot * PANELS + panel), queries, products, use_acc=panel > 0, is_async=True
        )
    return products


@gluon.jit
def issue_sums(
    sums0, sums1, is_first, count, block, context, value_ring, weight_tile, full,
    PANELS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """sums (+)= values^T x weights, a panel each, once the values are there; under way when this returns."""
    slot = count % STAGES
    mbarrier.wait(full.index(slot), (count // STAGES) & 1)
    if (block + 1) * _BLOCK > context:
        # What stands behind a context may be NaN, which a weight of 0 does not keep out.
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        exists = block * _BLOCK + gl.arange(0, _BLOCK, gl.SliceLayout(1, layout)) < context
        for panel in gl.static_range(PANELS):
            tile = value_ring.index(slot * PANELS + panel)
            tile.store(gl.where(exists[:, None], tile.load(layout), 0.0))
        fence_async_shared()
    weights = weight_tile.permute((1, 0))
    values = value_ring.index(slot * PANELS).permute((1, 0))
    sums0 = warpgroup_mma(values, weights, sums0, use_acc=is_first == 0, is_async=True)
    if PANELS == 2:
        values = value_ring.index(slot * PANELS + 1).permute((1, 0))
        sums1 = warpgroup_mma(values, weights, sums1, use_acc=is_first == 0, is_async=True)
    return sums0, sums1


@gluon.jit
def weigh(products, peak, total, sums0, sums1, is_first, block, context, log2_scale, weight_tile, mma: gl.constexpr):
    """Leave the weights of a block in shared memory, relative to a running peak; everything before is scaled to it."""
    scores = products * log2_scale
    if (block + 1) * _BLOCK > context:
        exists = block * _BLOCK + gl.arange(0, _BLOCK, gl.SliceLayout(1, mma)) < context
        scores = gl.where(exists[:, None], scores, float("-inf"))
    old = gl.where(is_first, -1e30, peak)
    peak = gl.maximum(old, gl.max(scores, 0))
    decay = gl.exp2(old - peak)
    weights = gl.exp2(scores - peak[None, :])
    # What is left of another head may be anything.
    total = gl.where(is_first, weights, total * decay[None, :] + weights)
    weight_tile.permute((1, 0)).store(weights.to(weight_tile.dtype))
    fence_async_shared()
    return peak, total, sums0 * decay[None, :], sums1 * decay[None, :]


@gluon.jit
def close_head(
    attended, parts, log_sums, sums0, sums1, peak, total, row, head, block, is_last, count, slot,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PANELS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Write the head of a request, or this run's part of it, as `decode_program` does."""
    HEAD_DIM: gl.constexpr = PANELS * _PANEL
    denominators = gl.sum(total, 0)
    heads = gl.arange(0, _GROUP, gl.SliceLayout(0, mma))
    dims = gl.arange(0, _PANEL, gl.SliceLayout(1, mma))
    # The run has come through this head from its block 0 on.
    has_begin = count >= block
    if is_last & has_begin:
        cells = ((row * KV_HEADS + head) * GROUP + heads)[None, :] * HEAD_DIM + dims[:, None]
        dtype: gl.constexpr = attended.dtype.element_ty
        gl.store(attended + cells, (sums0 / denominators[None, :]).to(dtype), mask=(heads < GROUP)[None, :])
        if PANELS == 2:
            result = (sums1 / denominators[None, :]).to(dtype)
            gl.store(attended + cells + _PANEL, result, mask=(heads < GROUP)[None, :])
    else:
        # A part that begins its head goes to the odd place of this run, any other to the even one.
        place = 2 * slot
        if has_begin:
            place += 1
        cells = (place * _GROUP + heads)[None, :] * HEAD_DIM + dims[:, None]
        gl.store(parts + cells, sums0 / denominators[None, :])
        if PANELS == 2:
            gl.store(parts + cells + _PANEL, sums1 / denominators[None, :])
        gl.store(log_sums + place * _GROUP + heads, peak + gl.log2(denominators))
