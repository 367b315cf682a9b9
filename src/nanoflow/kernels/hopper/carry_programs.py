"""A product and decode attention in one instruction stream, in Gluon for Hopper; `carry.py` launches it.

There is one program per SM. Three warps load, each into its own ring: tiles of the product, and keys and values for
each of two warpgroups. The warpgroups compute. Each has half of the rows of the product's tile and its own run of
blocks of keys, independent of the other's. A round of a warpgroup is `STEPS` k-steps of the product and one block of
keys:

    step QUERY_AT:  issue scores = keys x queries, issue the k-step, wait for all but the k-step, weigh
    step VALUE_AT:  issue sums += values^T x weights, issue the k-step, wait for all but the k-step
    other steps:    issue the k-step, wait for all but it

So attention's small products enter the tensor pipe in program order, and a k-step is running whenever a warpgroup waits
or computes weights. The accumulator of the product is not read before the last k-step of its tile.

`rings.py` explains rings. A warpgroup releases a slot once per use, when none of its running products reads the slot:
for a k-step, after the wait in the next step (or at the end of its tile); for keys and values, after the wait in the
step that they were issued in. Both warpgroups read the tiles; each has its own keys and values. There is no deadlock:
the loader of a ring waits only for readers of that ring. They use a ring in the order in which it is loaded. While they
wait for its next slot they hold at most one slot of it, that of the running k-step, out of two or more.

Shape legend: M rows of the product, N columns, F features, B requests, K KV heads, D head size, P pages of a table.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from nanoflow.graph.operation import KEY_BLOCK
from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PANEL, Results, Sums, no_sums
from nanoflow.kernels.hopper.carry_attention import PARTS, Attention, begin_run, load_blocks, make_memories
from nanoflow.kernels.hopper.carry_product import ROWS, Product, load_tiles, make_tiles
from nanoflow.kernels.hopper.rings import init_two_rings, make_ring, make_two_rings
from nanoflow.kernels.hopper.walk import Rows

_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PANEL: gl.constexpr = gl.constexpr(PANEL)
_ROWS: gl.constexpr = gl.constexpr(ROWS)
_BLOCK: gl.constexpr = gl.constexpr(KEY_BLOCK)
_PARTS: gl.constexpr = gl.constexpr(PARTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Constants that a program is compiled for.

    Attributes:
        block_n: Columns of a tile.
        steps: K-steps for each block of keys.
        stages: K-steps in shared memory.
        kv_stages: Blocks of keys, and of values, in shared memory, for each warpgroup.
        group: Query heads of a KV head.
        kv_heads: K.
        head_dim: D.
        kind: PLAIN, ADD or SWIGLU.
        item_bytes: Size of an element of x and weight: 2, or 1 (FP8 with scales).
        scan: Rows of the batch that are searched in one step.
        worker_registers: Registers of a thread of the second warpgroup.
    """

    block_n: int
    steps: int
    stages: int
    kv_stages: int
    group: int
    kv_heads: int
    head_dim: int
    kind: int
    item_bytes: int
    scan: int
    worker_registers: int


@gluon.jit
def _compute(attention, product, PART: gl.constexpr, STEPS: gl.constexpr):
    """Rounds of `STEPS` k-steps and one block; then k-steps alone if no blocks are left, or blocks if no tiles are."""
    gemm: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, product.BLOCK_N, 32 // product.ITEM_BYTES]
    )
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _GROUP, 16])
    sums, cursor = no_sums(0.0, _BLOCK, mma), attention.begin
    # Numbers of issued k-steps and blocks.
    count, done = product.program * 0, product.program * 0
    for tile in range(product.program, product.down * product.across, product.num_programs):
        acc = gl.zeros([_ROWS, product.BLOCK_N], gl.float32, gemm)
        fused = gl.minimum(attention.num_blocks - done, product.num_steps // STEPS)
        # 1. Rounds with a block.
        for turn in range(fused):
            acc, sums, cursor = _round(product, attention, acc, sums, cursor, turn, count, done, PART, STEPS, mma)
            count += STEPS
            done += 1
        # 2. K-steps alone.
        for step in range(fused * STEPS, product.num_steps):
            acc = product.issue_step(acc, count, PART)
            acc = warpgroup_mma_wait(1, deps=[acc])
            product.ring.release(count + product.ring.STAGES - 1, step > 0)
            count += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        product.ring.release(count + product.ring.STAGES - 1)
        product.write_tile(acc, tile, PART)
    # 3. The remaining blocks.
    for _ in range(done, attention.num_blocks):
        sums, cursor = attention.do_block(sums, cursor, done, mma)
        done += 1


@gluon.jit
def _round(
    product, attention, acc, sums, cursor, turn, count, done, PART: gl.constexpr, STEPS: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """`STEPS` k-steps of a tile, one of which is still running at the end, and all steps of a block of keys."""
    # The two warpgroups run attention at different steps, if there are enough steps.
    QUERY_AT: gl.constexpr = PART * (STEPS // 2) if STEPS >= 3 else 0
    VALUE_AT: gl.constexpr = QUERY_AT + 1
    for step in gl.static_range(STEPS):
        if step == QUERY_AT:
            products = attention.issue_scores(done, mma)
        if step == VALUE_AT:
            low, high = attention.issue_sums(sums, attention.is_first(cursor, done), cursor, done)
        acc = product.issue_step(acc, count, PART)
        if step == QUERY_AT:
            acc, products = warpgroup_mma_wait(1, deps=[acc, products])
            attention.key_ring.release(done)
        elif step == VALUE_AT:
            acc, low, high = warpgroup_mma_wait(1, deps=[acc, low, high])
            sums = Sums(sums.peak, sums.total, low, high)
            attention.value_ring.release(done)
        else:
            acc = warpgroup_mma_wait(1, deps=[acc])
        # The previous k-step has ended; if it was of another tile, its slot was released at that tile's end.
        product.ring.release(count + product.ring.STAGES - 1, (step > 0) | (turn > 0))
        count += 1
        if step == QUERY_AT:
            sums = attention.weigh(products, sums, attention.is_first(cursor, done), cursor, mma)
        if step == VALUE_AT:
            cursor = attention.end_block(sums, cursor, done, mma)
    return acc, sums, cursor


@gluon.jit(
    do_not_specialize=[
        "num_tokens", "tiles_m", "num_steps", "second_rows", "run", "share_begin", "share_until", "extra",
        "table_stride", "first_row", "num_rows",
    ],
    do_not_specialize_on_alignment=["page_tables", "context_len", "key_blocks", "begins", "bias", "x_scales"],
)  # fmt: skip
def carry_program(
    x, weight, bias, x_scales, scales, out, num_tokens, num_columns, tiles_m, tiles_n, num_steps, second_rows,
    q, keys, values, attended, parts, log_sums, begins, page_tables, context_len, key_blocks, table_stride, first_row,
    num_rows, log2_scale, run, share_begin, share_until, extra, CUT: gl.constexpr,
):  # fmt: skip
    """out [M, N] of x [M, F] and weight, and a share of the attention of q [B, K x GROUP, D] into attended and parts.

    Tile [2 ROWS, BLOCK_N] number i belongs to program i modulo their number; num_steps k-steps have all F features.
    Numbers that change between launches are separate arguments: in a tuple Triton would make a 1 a constant, and
    compile again.
    """
    PANELS: gl.constexpr = CUT.head_dim // _PANEL
    STEPS: gl.constexpr = CUT.steps
    dtype: gl.constexpr = out.dtype.element_ty
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    # 1. The first block of each warpgroup's run.
    rows = Rows(context_len, key_blocks, first_row, num_rows, CUT.kv_heads, _BLOCK)
    num_tiles, num_rounds, which = tiles_m * tiles_n, num_steps // STEPS, _PARTS * program
    cursor0, num_blocks0 = begin_run(
        begins, which, run, num_programs, num_tiles, num_rounds, extra, share_begin, share_until, rows, CUT.scan
    )
    cursor1, num_blocks1 = begin_run(
        begins, which + 1, run, num_programs, num_tiles, num_rounds, extra, share_begin, share_until, rows, CUT.scan
    )
    slot = run * (_PARTS * num_programs) + which
    results0 = Results(attended, parts, log_sums, slot, CUT.group)
    results1 = Results(attended, parts, log_sums, slot + 1, CUT.group)
    # 2. Rings and their barriers.
    factor: gl.constexpr = gl.float8e4nv if CUT.item_bytes == 1 else dtype
    x_tiles, weight_tiles = make_tiles(factor, CUT.stages, CUT.block_n, CUT.item_bytes)
    memory0, memory1 = make_memories(dtype, CUT.kv_stages, PANELS, _BLOCK)
    ring = make_ring(CUT.stages)
    key_ring0, key_ring1 = make_two_rings(CUT.kv_stages)
    value_ring0, value_ring1 = make_two_rings(CUT.kv_stages)
    ring.init(_PARTS)
    init_two_rings(key_ring0, key_ring1)
    init_two_rings(value_ring0, value_ring1)
    fence_async_shared()
    # 3. Two warpgroups compute, and three warps load.
    attention0 = Attention(memory0, key_ring0, value_ring0, rows, log2_scale, cursor0, num_blocks0, results0, PANELS)
    attention1 = Attention(memory1, key_ring1, value_ring1, rows, log2_scale, cursor1, num_blocks1, results1, PANELS)
    product = Product(
        out, bias, x_scales, scales, num_tokens, num_columns, tiles_m, tiles_n, num_steps, program, num_programs,
        x_tiles, weight_tiles, ring, CUT.block_n, CUT.kind, CUT.item_bytes,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_compute, (attention0, product, 0, STEPS)),
            (_compute, (attention1, product, 1, STEPS)),
            (load_tiles, (x, weight, product, second_rows)),
            (load_blocks, (q, keys, values, attention0, page_tables, table_stride)),
            (load_blocks, (q, keys, values, attention1, page_tables, table_stride)),
        ],
        [4, 1, 1, 1],
        [CUT.worker_registers, 40, 40, 40],
    )
