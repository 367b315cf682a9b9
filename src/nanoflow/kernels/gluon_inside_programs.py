"""A product and decode attention in one instruction stream, in Gluon for Hopper; `gluon_inside.py` launches it.

One program an SM. Three warps load, each a ring of its own: tiles of the product, and keys and values for either of two
warpgroups. The warpgroups compute: each has half of the rows of the product's tile, and a run of blocks of keys, and
knows nothing of the other's. A round of one is `STEPS` k-steps of the product and one block of keys; in it

    step QUERY_AT:  issue scores = keys x queries, issue the k-step, wait for all but the k-step, weigh
    step VALUE_AT:  issue sums += values^T x weights, issue the k-step, wait for all but the k-step
    other steps:    issue the k-step, wait for all but it

so that attention's small products enter the tensor pipe in program order, and a k-step is under way whenever a
warpgroup waits or weighs. The accumulator of the product is not looked at before the last k-step of its tile.

Barriers. Each ring has a pair a slot, `full` and `empty`; use n of a ring (its n-th k-step, or its n-th block) has slot
n % S and is the slot's use u = n // S. Both count phases from 0, and a wait for parity p returns once the phase that is
under way has another parity than p, thus at once for parity 1 on a fresh barrier.
- Who loads waits for `empty` with parity (u & 1) ^ 1: use 0 at once, use u > 0 for the phase u - 1, which the readers'
  arrivals after use u - 1 complete. It cannot be two phases behind, since phase u needs use u to be loaded first.
- Who reads waits for `full` with parity u & 1: for the phase u, completed by the one arrival of `expect` and its bytes.
  It cannot be two phases behind, since phase u + 1 needs the reader's own arrival after use u.
- `empty` takes one arrival for each warpgroup that reads the ring: two for tiles, one for keys, one for values. A
  warpgroup arrives once per use, when no product of its own that reads the slot is under way: for a k-step after the
  wait in the next step (or at the end of its tile), for keys and values after the wait in the step they were issued in.
Nothing can lock up: the loader of a ring waits for nothing but that ring's readers, and they use a ring in the order in
which it is loaded, and hold at most one slot of a ring while they wait for its next: the one of the k-step under way,
out of two slots or more.

Shape legend: M rows of the product, N columns, F features, B requests, K KV heads, D head size, P pages a table.
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

from nanoflow.kernels.gluon_attention_programs import MAX_GROUP, PAGE_TOKENS, PANEL
from nanoflow.kernels.launch import KEY_BLOCK, SHARES

# Rows of the product that one warpgroup has; warpgroups that compute; rows of tiles that are gone down together.
ROWS, PARTS, GROUP_M = 64, 2, 16
# What is written of a product: itself, it added to what is there, SwiGLU of its halves.
PLAIN, ADD, SWIGLU = 0, 1, 2
_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PAGE: gl.constexpr = gl.constexpr(PAGE_TOKENS)
_PANEL: gl.constexpr = gl.constexpr(PANEL)
_ROWS: gl.constexpr = gl.constexpr(ROWS)
_BLOCK: gl.constexpr = gl.constexpr(KEY_BLOCK)
_PARTS: gl.constexpr = gl.constexpr(PARTS)
_GROUP_M: gl.constexpr = gl.constexpr(GROUP_M)
_SHARES: gl.constexpr = gl.constexpr(SHARES)
_ADD: gl.constexpr = gl.constexpr(ADD)
_SWIGLU: gl.constexpr = gl.constexpr(SWIGLU)


@gluon.jit
def _run(which, num_programs, num_busy, extra, num_blocks):
    """Of a warpgroup: where its run of so many blocks begins, and how long it is.

    The first `num_busy` programs have a tile more than the others, whose warpgroups get `extra` blocks more for it.
    """
    num_idle = num_programs - num_busy
    per_busy = gl.maximum((num_blocks - _PARTS * num_idle * extra) // (_PARTS * num_programs), 0)
    of_busy = _PARTS * num_busy * per_busy
    per_idle = gl.cdiv(num_blocks - of_busy, _PARTS * num_idle)
    is_busy = which < _PARTS * num_busy
    begin = gl.where(is_busy, which * per_busy, of_busy + (which - _PARTS * num_busy) * per_idle)
    begin = gl.minimum(begin, num_blocks)
    stop = gl.minimum(begin + gl.where(is_busy, per_busy, per_idle), num_blocks)
    return begin, stop - begin


@gluon.jit
def _begin(
    begins, which, run, num_programs, num_busy, extra, share_begin, share_until, context_len, key_blocks, first_row,
    num_rows, KV_HEADS: gl.constexpr, SCAN: gl.constexpr,
):  # fmt: skip
    """The run of blocks of a warpgroup among a launch's share: where it begins, and how many they are."""
    base = gl.load(key_blocks + first_row)
    total = (gl.load(key_blocks + first_row + num_rows) - base) * KV_HEADS
    first = (total.to(gl.int64) * share_begin // _SHARES).to(gl.int32)
    last = (total.to(gl.int64) * share_until // _SHARES).to(gl.int32)
    begin, count = _run(which, num_programs, num_busy, extra, last - first)
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
def _advance(row, head, block, context, context_len, first_row, num_rows, KV_HEADS: gl.constexpr):
    """The next block of keys, else of the next head, else of the next row that has any."""
    block += 1
    if block * _BLOCK >= context:
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
def _place(tile, tiles_m, tiles_n):
    """Row and column of a tile, in tiles: down the columns of one group of rows of tiles after the other."""
    first = tile // (_GROUP_M * tiles_n) * _GROUP_M
    height = gl.minimum(tiles_m - first, _GROUP_M)
    place = tile % (_GROUP_M * tiles_n)
    return first + place % height, place // height


@gluon.jit
def _load_tiles(
    x, weight, x_ring, weight_ring, full, empty, program, num_programs, tiles_m, tiles_n, num_steps, second_rows,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Fill the ring of the product: `num_steps` k-steps of each of this program's tiles.

    Weights come in halves of a tile, the second one `second_rows` after the first: next to it, or of the other factor.
    """
    HALF: gl.constexpr = BLOCK_N // 2
    STRIDE: gl.constexpr = HALF if KIND == _SWIGLU else BLOCK_N
    count = program * 0
    for tile in range(program, tiles_m * tiles_n, num_programs):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n)
        row, column = tile_m * (_PARTS * _ROWS), tile_n * STRIDE
        for step in range(num_steps):
            slot = count % STAGES
            mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, (_PARTS * _ROWS + BLOCK_N) * _PANEL * 2)
            tma.async_copy_global_to_shared(x, [row, step * _PANEL], bar, x_ring.index(slot))
            left, right = weight_ring.index(slot).slice(0, HALF), weight_ring.index(slot).slice(HALF, HALF)
            tma.async_copy_global_to_shared(weight, [column, step * _PANEL], bar, left)
            tma.async_copy_global_to_shared(weight, [column + second_rows, step * _PANEL], bar, right)
            count += 1


@gluon.jit
def _load_blocks(
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
        row, head, block, context = _advance(row, head, block, context, context_len, first_row, num_rows, KV_HEADS)


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
def _issue_step(acc, count, x_ring, weight_ring, full, PART: gl.constexpr, STAGES: gl.constexpr):
    """A k-step of this warpgroup's rows, once it is there; it is under way when this returns."""
    slot = count % STAGES
    mbarrier.wait(full.index(slot), (count // STAGES) & 1)
    rows = x_ring.index(slot).slice(PART * _ROWS, _ROWS)
    return warpgroup_mma(rows, weight_ring.index(slot).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _issue_scores(products, count, key_ring, query_ring, full, PANELS: gl.constexpr, STAGES: gl.constexpr):
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
def _issue_sums(
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
def _weigh(products, peak, total, sums0, sums1, is_first, block, context, log2_scale, weight_tile, mma: gl.constexpr):
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
def _close(
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


@gluon.jit
def _write(
    out, bias, acc, tile_row, tile_n, num_rows, num_columns,
    BLOCK_N: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Rows [ROWS, BLOCK_N] of a tile from registers, in halves, each of which a thread has both columns of."""
    HALF: gl.constexpr = BLOCK_N // 2
    left, right = acc.reshape([_ROWS, 2, HALF]).permute((0, 2, 1)).split()
    if KIND == _SWIGLU:
        dtype: gl.constexpr = out.dtype.element_ty
        # Rounded wherever the separate operations would write to memory or round.
        exact = left.to(dtype).to(gl.float32)
        activated = (exact / (1.0 + gl.exp(-exact))).to(dtype).to(gl.float32)
        product = (activated * right.to(dtype).to(gl.float32)).to(dtype)
        _write_half(out, bias, product, tile_row, tile_n * HALF, num_rows, num_columns, HALF, KIND, HAS_BIAS)
    else:
        column = tile_n * BLOCK_N
        _write_half(out, bias, left, tile_row, column, num_rows, num_columns, HALF, KIND, HAS_BIAS)
        _write_half(out, bias, right, tile_row, column + HALF, num_rows, num_columns, HALF, KIND, HAS_BIAS)


@gluon.jit
def _write_half(
    out, bias, cells, row, column, num_rows, num_columns,
    WIDTH: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Cells [ROWS, WIDTH], 16 bytes a thread and 64 a row, without shared memory; added in float32, rounded once."""
    wide: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]] + ([[0, 64]] if WIDTH == 128 else []),
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[_ROWS, WIDTH],
    )
    dtype: gl.constexpr = out.dtype.element_ty
    rows = row + gl.arange(0, _ROWS, gl.SliceLayout(1, wide))
    columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    places = out + rows[:, None] * num_columns + columns[None, :]
    exists = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if HAS_BIAS or KIND == _ADD:
        cells = gl.convert_layout(cells, wide)
        if HAS_BIAS:
            cells += gl.load(bias + columns, mask=columns < num_columns, other=0.0).to(gl.float32)[None, :]
        if KIND == _ADD:
            cells += gl.load(places, mask=exists, other=0.0).to(gl.float32)
        gl.store(places, cells.to(dtype), mask=exists)
    else:
        gl.store(places, gl.convert_layout(cells.to(dtype), wide), mask=exists)


@gluon.jit
def _compute(
    out, bias, attended, parts, log_sums, x_ring, weight_ring, full, empty, query_ring, key_ring, value_ring,
    weight_tile, key_full, key_empty, value_full, value_empty, context_len, first_row, num_rows, log2_scale, row, head,
    block, context, num_blocks, slot, program, num_programs, tiles_m, tiles_n, num_rounds, num_tokens, num_columns,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PANELS: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Rounds of `STEPS` k-steps and one block; k-steps alone once no blocks are left, and blocks once no tiles are."""
    # Warpgroups attend at different steps, if there are enough.
    QUERY_AT: gl.constexpr = PART * (STEPS // 2) if STEPS >= 4 else 0
    VALUE_AT: gl.constexpr = QUERY_AT + 1
    gemm: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _GROUP, 16])
    peak = gl.zeros([_GROUP], gl.float32, gl.SliceLayout(0, mma))
    total = gl.zeros([_BLOCK, _GROUP], gl.float32, mma)
    sums0 = gl.zeros([_PANEL, _GROUP], gl.float32, mma)
    sums1 = gl.zeros([_PANEL, _GROUP], gl.float32, mma)
    # K-steps and blocks that have been issued.
    count, done = program * 0, program * 0
    for tile in range(program, tiles_m * tiles_n, num_programs):
        acc = gl.zeros([_ROWS, BLOCK_N], gl.float32, gemm)
        fused = gl.minimum(num_blocks - done, num_rounds)
        # 1. Rounds with a block.
        for turn in range(fused):
            for step in gl.static_range(STEPS):
                if step == QUERY_AT:
                    products = gl.zeros([_BLOCK, _GROUP], gl.float32, mma)
                    products = _issue_scores(products, done, key_ring, query_ring, key_full, PANELS, KV_STAGES)
                if step == VALUE_AT:
                    is_first = (block == 0) | (done == 0)
                    sums0, sums1 = _issue_sums(
                        sums0, sums1, is_first, done, block, context, value_ring, weight_tile, value_full,
                        PANELS, KV_STAGES,
                    )  # fmt: skip
                acc = _issue_step(acc, count, x_ring, weight_ring, full, PART, STAGES)
                if step == QUERY_AT:
                    acc, products = warpgroup_mma_wait(1, deps=[acc, products])
                    mbarrier.arrive(key_empty.index(done % KV_STAGES), count=1)
                elif step == VALUE_AT:
                    acc, sums0, sums1 = warpgroup_mma_wait(1, deps=[acc, sums0, sums1])
                    mbarrier.arrive(value_empty.index(done % KV_STAGES), count=1)
                else:
                    acc = warpgroup_mma_wait(1, deps=[acc])
                # The k-step before this one is done, unless it was of another tile, and done with at its end.
                mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=(step > 0) | (turn > 0))
                count += 1
                if step == QUERY_AT:
                    is_first = (block == 0) | (done == 0)
                    peak, total, sums0, sums1 = _weigh(
                        products, peak, total, sums0, sums1, is_first, block, context, log2_scale, weight_tile, mma
                    )
                if step == VALUE_AT:
                    is_last = (block + 1) * _BLOCK >= context
                    if is_last | (done + 1 == num_blocks):
                        _close(
                            attended, parts, log_sums, sums0, sums1, peak, total, row, head, block, is_last, done, slot,
                            GROUP, KV_HEADS, PANELS, mma,
                        )  # fmt: skip
                    done += 1
                    row, head, block, context = _advance(
                        row, head, block, context, context_len, first_row, num_rows, KV_HEADS
                    )
        # 2. Rounds without.
        for turn in range(fused, num_rounds):
            for step in gl.static_range(STEPS):
                acc = _issue_step(acc, count, x_ring, weight_ring, full, PART, STAGES)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=(step > 0) | (turn > 0))
                count += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        tile_m, tile_n = _place(tile, tiles_m, tiles_n)
        tile_row = tile_m * (_PARTS * _ROWS) + PART * _ROWS
        _write(out, bias, acc, tile_row, tile_n, num_tokens, num_columns, BLOCK_N, KIND, HAS_BIAS)
    # 3. Blocks that are left.
    for _ in range(done, num_blocks):
        is_first = (block == 0) | (done == 0)
        products = gl.zeros([_BLOCK, _GROUP], gl.float32, mma)
        products = _issue_scores(products, done, key_ring, query_ring, key_full, PANELS, KV_STAGES)
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(key_empty.index(done % KV_STAGES), count=1)
        peak, total, sums0, sums1 = _weigh(
            products, peak, total, sums0, sums1, is_first, block, context, log2_scale, weight_tile, mma
        )
        sums0, sums1 = _issue_sums(
            sums0, sums1, is_first, done, block, context, value_ring, weight_tile, value_full, PANELS, KV_STAGES
        )
        sums0, sums1 = warpgroup_mma_wait(0, deps=[sums0, sums1])
        mbarrier.arrive(value_empty.index(done % KV_STAGES), count=1)
        is_last = (block + 1) * _BLOCK >= context
        if is_last | (done + 1 == num_blocks):
            _close(
                attended, parts, log_sums, sums0, sums1, peak, total, row, head, block, is_last, done, slot,
                GROUP, KV_HEADS, PANELS, mma,
            )  # fmt: skip
        done += 1
        row, head, block, context = _advance(row, head, block, context, context_len, first_row, num_rows, KV_HEADS)


@gluon.jit(
    do_not_specialize=[
        "num_tokens", "tiles_m", "num_rounds", "second_rows", "run", "share_begin", "share_until", "num_busy", "extra",
        "table_stride", "first_row", "num_rows",
    ],
    do_not_specialize_on_alignment=["page_tables", "context_len", "key_blocks", "begins", "bias"],
)  # fmt: skip
def inside_program(
    x, weight, bias, out, num_tokens, num_columns, tiles_m, tiles_n, num_rounds, second_rows,
    q, keys, values, attended, parts, log_sums, begins, page_tables, context_len, key_blocks, table_stride, first_row,
    num_rows, log2_scale, run, share_begin, share_until, num_busy, extra,
    BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, KV_STAGES: gl.constexpr, GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr, SCAN: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N] of x [M, F] and weight, and a share of the attention of q [B, K x GROUP, D], into attended and parts.

    Tiles of [2 ROWS, BLOCK_N] go round the programs; F is at most num_rounds x STEPS x PANEL.
    """
    PANELS: gl.constexpr = HEAD_DIM // _PANEL
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    # 1. Where each warpgroup's run of blocks begins.
    row0, head0, block0, context0, num_blocks0 = _begin(
        begins, _PARTS * program, run, num_programs, num_busy, extra, share_begin, share_until, context_len, key_blocks,
        first_row, num_rows, KV_HEADS, SCAN,
    )  # fmt: skip
    row1, head1, block1, context1, num_blocks1 = _begin(
        begins, _PARTS * program + 1, run, num_programs, num_busy, extra, share_begin, share_until, context_len,
        key_blocks, first_row, num_rows, KV_HEADS, SCAN,
    )  # fmt: skip
    slot0 = run * (_PARTS * num_programs) + _PARTS * program
    # 2. Rings and their barriers.
    dtype: gl.constexpr = out.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, _PARTS * _ROWS, _PANEL], tile)
    weight_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, _PANEL], tile)
    key_ring0 = gl.allocate_shared_memory(dtype, [KV_STAGES * PANELS, _BLOCK, _PANEL], tile)
    key_ring1 = gl.allocate_shared_memory(dtype, [KV_STAGES * PANELS, _BLOCK, _PANEL], tile)
    value_ring0 = gl.allocate_shared_memory(dtype, [KV_STAGES * PANELS, _BLOCK, _PANEL], tile)
    value_ring1 = gl.allocate_shared_memory(dtype, [KV_STAGES * PANELS, _BLOCK, _PANEL], tile)
    query_ring0 = gl.allocate_shared_memory(dtype, [KV_STAGES * PANELS, _GROUP, _PANEL], tile)
    query_ring1 = gl.allocate_shared_memory(dtype, [KV_STAGES * PANELS, _GROUP, _PANEL], tile)
    weight_tile0 = gl.allocate_shared_memory(dtype, [_GROUP, _BLOCK], tile)
    weight_tile1 = gl.allocate_shared_memory(dtype, [_GROUP, _BLOCK], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_full0 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    key_full1 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    key_empty0 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    key_empty1 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    value_full0 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    value_full1 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    value_empty0 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    value_empty1 = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=_PARTS)
    for stage in gl.static_range(KV_STAGES):
        mbarrier.init(key_full0.index(stage), count=1)
        mbarrier.init(key_full1.index(stage), count=1)
        mbarrier.init(key_empty0.index(stage), count=1)
        mbarrier.init(key_empty1.index(stage), count=1)
        mbarrier.init(value_full0.index(stage), count=1)
        mbarrier.init(value_full1.index(stage), count=1)
        mbarrier.init(value_empty0.index(stage), count=1)
        mbarrier.init(value_empty1.index(stage), count=1)
    fence_async_shared()
    # 3. Two warpgroups, and three warps that load.
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    out, bias, attended, parts, log_sums, x_ring, weight_ring, full, empty, query_ring0, key_ring0,
                    value_ring0, weight_tile0, key_full0, key_empty0, value_full0, value_empty0, context_len,
                    first_row, num_rows, log2_scale, row0, head0, block0, context0, num_blocks0, slot0, program,
                    num_programs, tiles_m, tiles_n, num_rounds, num_tokens, num_columns,
                    0, BLOCK_N, STEPS, STAGES, KV_STAGES, GROUP, KV_HEADS, PANELS, KIND, HAS_BIAS,
                ),
            ),
            (
                _compute,
                (
                    out, bias, attended, parts, log_sums, x_ring, weight_ring, full, empty, query_ring1, key_ring1,
                    value_ring1, weight_tile1, key_full1, key_empty1, value_full1, value_empty1, context_len,
                    first_row, num_rows, log2_scale, row1, head1, block1, context1, num_blocks1, slot0 + 1, program,
                    num_programs, tiles_m, tiles_n, num_rounds, num_tokens, num_columns,
                    1, BLOCK_N, STEPS, STAGES, KV_STAGES, GROUP, KV_HEADS, PANELS, KIND, HAS_BIAS,
                ),
            ),
            (
                _load_tiles,
                (
                    x, weight, x_ring, weight_ring, full, empty, program, num_programs, tiles_m, tiles_n,
                    num_rounds * STEPS, second_rows, BLOCK_N, STAGES, KIND,
                ),
            ),
            (
                _load_blocks,
                (
                    q, keys, values, query_ring0, key_ring0, value_ring0, key_full0, key_empty0, value_full0,
                    value_empty0, page_tables, table_stride, context_len, first_row, num_rows, row0, head0, block0,
                    context0, num_blocks0, GROUP, KV_HEADS, PANELS, KV_STAGES,
                ),
            ),
            (
                _load_blocks,
                (
                    q, keys, values, query_ring1, key_ring1, value_ring1, key_full1, key_empty1, value_full1,
                    value_empty1, page_tables, table_stride, context_len, first_row, num_rows, row1, head1, block1,
                    context1, num_blocks1, GROUP, KV_HEADS, PANELS, KV_STAGES,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [WORKER_REGISTERS, 40, 40, 40],
    )  # fmt: skip
