"""The program of decode attention that runs on Hopper, in Gluon; `attention.py` says how the work is cut.

One warp issues loads, a warpgroup computes; barriers in shared memory say which slot of the ring is full or empty.
Scores are keys x queries and the result is dimensions x queries, so that what fills the tensor cores' 64 rows are keys,
then dimensions, and the few queries of a KV head are columns: eight, the fewest there can be.

Shape legend: B rows with room for decodes, K KV heads, D head size, N pages of G tokens, P pages a table.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Query heads of a KV head, at most; tokens a page; dimensions in a row of shared memory, which TMA swizzles.
MAX_GROUP, PAGE_TOKENS, PANEL = 8, 16, 64
_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PAGE: gl.constexpr = gl.constexpr(PAGE_TOKENS)
_PANEL: gl.constexpr = gl.constexpr(PANEL)


@gluon.jit
def advance(row, head, block, context, context_len, first_row, num_rows, KV_HEADS: gl.constexpr, BLOCK: gl.constexpr):
    """The next block of keys, else of the next head, else of the next row that has any."""
    block += 1
    if block * BLOCK >= context:
        block = block * 0
        head += 1
        if head == KV_HEADS:
            head = head * 0
            row = gl.minimum(row + 1, num_rows - 1)
            context = gl.load(context_len + first_row + row)
            while (context == 0) & (row < num_rows - 1):
                row += 1
                context = gl.load(context_len + first_row + row)
    return row, head, block, context


@gluon.jit
def _load(
    keys, values, key_ring, value_ring, full, empty, page_tables, table_stride, context_len, first_row, num_rows,
    row, head, block, context, num_steps,
    KV_HEADS: gl.constexpr, PANELS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring. Pages beyond the context are the last one again: every slot gets the same number of bytes."""
    PAGES: gl.constexpr = BLOCK // _PAGE
    for step in range(num_steps):
        slot = step % STAGES
        last = (context - 1) // _PAGE
        table = page_tables + (first_row + row) * table_stride
        mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        bar = full.index(slot)
        mbarrier.expect(bar, 2 * BLOCK * PANELS * _PANEL * 2)
        for i in gl.static_range(PAGES):
            page = gl.load(table + gl.minimum(block * PAGES + i, last))
            at = (page * KV_HEADS + head) * _PAGE
            for panel in gl.static_range(PANELS):
                tile = key_ring.index(slot * PANELS + panel).slice(i * _PAGE, _PAGE)
                tma.async_copy_global_to_shared(keys, [at, panel * _PANEL], bar, tile)
            for panel in gl.static_range(PANELS):
                tile = value_ring.index(slot * PANELS + panel).slice(i * _PAGE, _PAGE)
                tma.async_copy_global_to_shared(values, [at, panel * _PANEL], bar, tile)
        row, head, block, context = advance(
            row, head, block, context, context_len, first_row, num_rows, KV_HEADS, BLOCK
        )


@gluon.jit
def _attend(
    out, parts, log_sums, q, key_ring, value_ring, query_tile, weight_tile, full, empty, context_len, first_row,
    num_rows, log2_scale, row, head, block, context, num_steps, program,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PANELS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Empty the ring: a running softmax over the blocks of one head of one request after the other."""
    HEAD_DIM: gl.constexpr = PANELS * _PANEL
    dtype: gl.constexpr = q.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, _GROUP, 16]
    )
    key_layout: gl.constexpr = gl.SliceLayout(1, mma)
    head_layout: gl.constexpr = gl.SliceLayout(0, mma)
    q_layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    peak = gl.full([_GROUP], -1e30, gl.float32, head_layout)
    total = gl.zeros([BLOCK, _GROUP], gl.float32, mma)
    acc0 = gl.zeros([_PANEL, _GROUP], gl.float32, mma)
    acc1 = gl.zeros([_PANEL, _GROUP], gl.float32, mma)
    is_new = num_steps > 0
    # The sums keep `first_block` a variable of its own: the compiler takes a plain copy for another name of `block`.
    first_block = block + 0 * num_steps
    for step in range(num_steps):
        slot = step % STAGES
        # 1. Another head or request brings new queries.
        if is_new:
            heads = gl.arange(0, _GROUP, gl.SliceLayout(1, q_layout))
            dims = gl.arange(0, _PANEL, gl.SliceLayout(0, q_layout))
            for panel in gl.static_range(PANELS):
                cells = ((row * KV_HEADS + head) * GROUP + heads)[:, None] * HEAD_DIM + panel * _PANEL + dims[None, :]
                query_tile.index(panel).store(gl.load(q + cells, mask=(heads < GROUP)[:, None], other=0.0))
            fence_async_shared()
            peak = gl.full([_GROUP], -1e30, gl.float32, head_layout)
            total = gl.zeros([BLOCK, _GROUP], gl.float32, mma)
            acc0 = gl.zeros([_PANEL, _GROUP], gl.float32, mma)
            acc1 = gl.zeros([_PANEL, _GROUP], gl.float32, mma)
            first_block = block + 0 * step
        # 2. Scores.
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        products = gl.zeros([BLOCK, _GROUP], gl.float32, mma)
        for panel in gl.static_range(PANELS):
            products = warpgroup_mma(
                key_ring.index(slot * PANELS + panel), query_tile.index(panel).permute((1, 0)), products, is_async=True
            )
        scores = warpgroup_mma_wait(0, deps=[products]) * log2_scale
        is_last = (block + 1) * BLOCK >= context
        if (block + 1) * BLOCK > context:
            exists = block * BLOCK + gl.arange(0, BLOCK, key_layout) < context
            scores = gl.where(exists[:, None], scores, float("-inf"))
            # What stands behind a context may be NaN, which a weight of 0 does not keep out.
            value_exists = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, v_layout)) < context
            for panel in gl.static_range(PANELS):
                tile = value_ring.index(slot * PANELS + panel)
                tile.store(gl.where(value_exists[:, None], tile.load(v_layout), 0.0))
        # 3. Running softmax.
        new_peak = gl.maximum(peak, gl.max(scores, 0))
        weights = gl.exp2(scores - new_peak[None, :])
        decay = gl.exp2(peak - new_peak)
        peak = new_peak
        total = total * decay[None, :] + weights
        weight_tile.permute((1, 0)).store(weights.to(dtype))
        fence_async_shared()
        # 4. Values.
        acc0 = warpgroup_mma(
            value_ring.index(slot * PANELS).permute((1, 0)),
            weight_tile.permute((1, 0)),
            acc0 * decay[None, :],
            is_async=True,
        )
        if PANELS == 2:
            acc1 = warpgroup_mma(
                value_ring.index(slot * PANELS + 1).permute((1, 0)),
                weight_tile.permute((1, 0)),
                acc1 * decay[None, :],
                is_async=True,
            )
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0])
        mbarrier.arrive(empty.index(slot), count=1)
        # 5. The head of a request ends, or this program's part of it.
        is_new = is_last
        if is_last | (step + 1 == num_steps):
            sums = gl.sum(total, 0)
            heads = gl.arange(0, _GROUP, head_layout)
            dims = gl.arange(0, _PANEL, key_layout)
            if is_last & (first_block == 0):
                cells = ((row * KV_HEADS + head) * GROUP + heads)[None, :] * HEAD_DIM + dims[:, None]
                gl.store(out + cells, (acc0 / sums[None, :]).to(dtype), mask=(heads < GROUP)[None, :])
                if PANELS == 2:
                    gl.store(out + cells + _PANEL, (acc1 / sums[None, :]).to(dtype), mask=(heads < GROUP)[None, :])
            else:
                # A part that begins its head goes to the odd place of this program, any other to the even one.
                place = 2 * program + (first_block == 0).to(gl.int32)
                cells = (place * _GROUP + heads)[None, :] * HEAD_DIM + dims[:, None]
                gl.store(parts + cells, acc0 / sums[None, :])
                if PANELS == 2:
                    gl.store(parts + cells + _PANEL, acc1 / sums[None, :])
                gl.store(log_sums + place * _GROUP + heads, peak + gl.log2(sums))
        row, head, block, context = advance(
            row, head, block, context, context_len, first_row, num_rows, KV_HEADS, BLOCK
        )


@gluon.jit(do_not_specialize=["table_stride", "first_row", "num_rows"])
def decode_program(
    out, parts, log_sums, q, keys, values, page_tables, context_len, key_blocks, table_stride, first_row, num_rows,
    log2_scale,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SCAN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """An equal run of the blocks of keys of all rows, in the order of row, head, block; out is [B, K x GROUP, D]."""
    PANELS: gl.constexpr = HEAD_DIM // _PANEL
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    # 1. This program's run.
    base = gl.load(key_blocks + first_row)
    num_blocks = (gl.load(key_blocks + first_row + num_rows) - base) * KV_HEADS
    per_program = gl.cdiv(num_blocks, num_programs)
    begin = gl.minimum(program * per_program, num_blocks)
    num_steps = gl.minimum(begin + per_program, num_blocks) - begin
    # 2. Its first row stands behind the rows whose blocks all come before.
    scan_layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    row = begin * 0
    for at in range(0, num_rows, SCAN):
        rows = at + gl.arange(0, SCAN, scan_layout)
        ends = gl.load(key_blocks + first_row + gl.minimum(rows, num_rows - 1) + 1)
        row += gl.sum((((ends - base) * KV_HEADS <= begin) & (rows < num_rows)).to(gl.int32), 0)
    row = gl.minimum(row, num_rows - 1)
    context = gl.load(context_len + first_row + row)
    within = begin - (gl.load(key_blocks + first_row + row) - base) * KV_HEADS
    blocks = gl.maximum(gl.cdiv(context, BLOCK), 1)
    head, block = within // blocks, within % blocks
    # 3. A ring of keys and values between who loads and who computes.
    dtype: gl.constexpr = q.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    key_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, BLOCK, _PANEL], tile)
    value_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, BLOCK, _PANEL], tile)
    query_tile = gl.allocate_shared_memory(dtype, [PANELS, _GROUP, _PANEL], tile)
    weight_tile = gl.allocate_shared_memory(dtype, [_GROUP, BLOCK], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    out, parts, log_sums, q, key_ring, value_ring, query_tile, weight_tile, full, empty, context_len,
                    first_row, num_rows, log2_scale, row, head, block, context, num_steps, program,
                    GROUP, KV_HEADS, PANELS, BLOCK, STAGES, WARPS,
                ),
            ),
            (
                _load,
                (
                    keys, values, key_ring, value_ring, full, empty, page_tables, table_stride, context_len, first_row,
                    num_rows, row, head, block, context, num_steps, KV_HEADS, PANELS, BLOCK, STAGES,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
