"""A product and decode attention in one instruction stream, in Gluon for Hopper; `carry.py` launches it.

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
    warpgroup_mma_wait,
)

from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PANEL, advance
from nanoflow.kernels.hopper.carry_attention import (
    PARTS,
    begin_run,
    close_head,
    issue_scores,
    issue_sums,
    load_blocks,
    weigh,
)
from nanoflow.kernels.hopper.carry_product import ROWS, issue_step, load_tiles, place_of, write_tile
from nanoflow.kernels.launch import KEY_BLOCK

_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PANEL: gl.constexpr = gl.constexpr(PANEL)
_ROWS: gl.constexpr = gl.constexpr(ROWS)
_BLOCK: gl.constexpr = gl.constexpr(KEY_BLOCK)
_PARTS: gl.constexpr = gl.constexpr(PARTS)


@gluon.jit
def _compute(
    out, bias, attended, parts, log_sums, x_ring, weight_ring, full, empty, query_ring, key_ring, value_ring,
    weight_tile, key_full, key_empty, value_full, value_empty, context_len, first_row, num_rows, log2_scale, row, head,
    block, context, num_blocks, slot, program, num_programs, tiles_m, tiles_n, num_steps, num_tokens, num_columns,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PANELS: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Rounds of `STEPS` k-steps and one block; k-steps alone once no blocks are left, and blocks once no tiles are."""
    # Warpgroups attend at different steps, if there are enough.
    QUERY_AT: gl.constexpr = PART * (STEPS // 2) if STEPS >= 3 else 0
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
        fused = gl.minimum(num_blocks - done, num_steps // STEPS)
        # 1. Rounds with a block.
        for turn in range(fused):
            for step in gl.static_range(STEPS):
                if step == QUERY_AT:
                    products = gl.zeros([_BLOCK, _GROUP], gl.float32, mma)
                    products = issue_scores(products, done, key_ring, query_ring, key_full, PANELS, KV_STAGES)
                if step == VALUE_AT:
                    is_first = (block == 0) | (done == 0)
                    sums0, sums1 = issue_sums(
                        sums0, sums1, is_first, done, block, context, value_ring, weight_tile, value_full,
                        PANELS, KV_STAGES,
                    )  # fmt: skip
                acc = issue_step(acc, count, x_ring, weight_ring, full, PART, STAGES)
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
                    peak, total, sums0, sums1 = weigh(
                        products, peak, total, sums0, sums1, is_first, block, context, log2_scale, weight_tile, mma
                    )
                if step == VALUE_AT:
                    is_last = (block + 1) * _BLOCK >= context
                    if is_last | (done + 1 == num_blocks):
                        close_head(
                            attended, parts, log_sums, sums0, sums1, peak, total, row, head, block, is_last, done, slot,
                            GROUP, KV_HEADS, PANELS, mma,
                        )  # fmt: skip
                    done += 1
                    row, head, block, context = advance(
                        row, head, block, context, context_len, first_row, num_rows, KV_HEADS, _BLOCK
                    )
        # 2. K-steps without.
        for step in range(fused * STEPS, num_steps):
            acc = issue_step(acc, count, x_ring, weight_ring, full, PART, STAGES)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=step > 0)
            count += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n)
        tile_row = tile_m * (_PARTS * _ROWS) + PART * _ROWS
        write_tile(out, bias, acc, tile_row, tile_n, num_tokens, num_columns, BLOCK_N, KIND, HAS_BIAS)
    # 3. Blocks that are left.
    for _ in range(done, num_blocks):
        is_first = (block == 0) | (done == 0)
        products = gl.zeros([_BLOCK, _GROUP], gl.float32, mma)
        products = issue_scores(products, done, key_ring, query_ring, key_full, PANELS, KV_STAGES)
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(key_empty.index(done % KV_STAGES), count=1)
        peak, total, sums0, sums1 = weigh(
            products, peak, total, sums0, sums1, is_first, block, context, log2_scale, weight_tile, mma
        )
        sums0, sums1 = issue_sums(
            sums0, sums1, is_first, done, block, context, value_ring, weight_tile, value_full, PANELS, KV_STAGES
        )
        sums0, sums1 = warpgroup_mma_wait(0, deps=[sums0, sums1])
        mbarrier.arrive(value_empty.index(done % KV_STAGES), count=1)
        is_last = (block + 1) * _BLOCK >= context
        if is_last | (done + 1 == num_blocks):
            close_head(
                attended, parts, log_sums, sums0, sums1, peak, total, row, head, block, is_last, done, slot,
                GROUP, KV_HEADS, PANELS, mma,
            )  # fmt: skip
        done += 1
        row, head, block, context = advance(
            row, head, block, context, context_len, first_row, num_rows, KV_HEADS, _BLOCK
        )


@gluon.jit(
    do_not_specialize=[
        "num_tokens", "tiles_m", "num_steps", "second_rows", "run", "share_begin", "share_until", "extra",
        "table_stride", "first_row", "num_rows",
    ],
    do_not_specialize_on_alignment=["page_tables", "context_len", "key_blocks", "begins", "bias"],
)  # fmt: skip
def carry_program(
    x, weight, bias, out, num_tokens, num_columns, tiles_m, tiles_n, num_steps, second_rows,
    q, keys, values, attended, parts, log_sums, begins, page_tables, context_len, key_blocks, table_stride, first_row,
    num_rows, log2_scale, run, share_begin, share_until, extra,
    BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, KV_STAGES: gl.constexpr, GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr, SCAN: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N] of x [M, F] and weight, and a share of the attention of q [B, K x GROUP, D], into attended and parts.

    Tiles of [2 ROWS, BLOCK_N] go round the programs; F is at most num_steps x PANEL.
    """
    PANELS: gl.constexpr = HEAD_DIM // _PANEL
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    # 1. Where each warpgroup's run of blocks begins.
    num_tiles = tiles_m * tiles_n
    row0, head0, block0, context0, num_blocks0 = begin_run(
        begins, _PARTS * program, run, num_programs, num_tiles, num_steps // STEPS, extra, share_begin, share_until,
        context_len, key_blocks, first_row, num_rows, KV_HEADS, SCAN,
    )  # fmt: skip
    row1, head1, block1, context1, num_blocks1 = begin_run(
        begins, _PARTS * program + 1, run, num_programs, num_tiles, num_steps // STEPS, extra, share_begin, share_until,
        context_len, key_blocks, first_row, num_rows, KV_HEADS, SCAN,
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
                    num_programs, tiles_m, tiles_n, num_steps, num_tokens, num_columns,
                    0, BLOCK_N, STEPS, STAGES, KV_STAGES, GROUP, KV_HEADS, PANELS, KIND, HAS_BIAS,
                ),
            ),
            (
                _compute,
                (
                    out, bias, attended, parts, log_sums, x_ring, weight_ring, full, empty, query_ring1, key_ring1,
                    value_ring1, weight_tile1, key_full1, key_empty1, value_full1, value_empty1, context_len,
                    first_row, num_rows, log2_scale, row1, head1, block1, context1, num_blocks1, slot0 + 1, program,
                    num_programs, tiles_m, tiles_n, num_steps, num_tokens, num_columns,
                    1, BLOCK_N, STEPS, STAGES, KV_STAGES, GROUP, KV_HEADS, PANELS, KIND, HAS_BIAS,
                ),
            ),
            (
                load_tiles,
                (
                    x, weight, x_ring, weight_ring, full, empty, program, num_programs, tiles_m, tiles_n,
                    num_steps, second_rows, BLOCK_N, STAGES, KIND,
                ),
            ),
            (
                load_blocks,
                (
                    q, keys, values, query_ring0, key_ring0, value_ring0, key_full0, key_empty0, value_full0,
                    value_empty0, page_tables, table_stride, context_len, first_row, num_rows, row0, head0, block0,
                    context0, num_blocks0, GROUP, KV_HEADS, PANELS, KV_STAGES,
                ),
            ),
            (
                load_blocks,
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
