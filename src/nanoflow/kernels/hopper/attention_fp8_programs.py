"""The Gluon program of decode attention on Hopper over keys and values in 8 bits; `attention.py` divides the work.

Tiles of e4m3 numbers, copied as in `attention_programs.py`, are read to registers, become float16 there (exactly, by
one instruction for two numbers) and are the left factors of the products, which sum in float32. So each number crosses
shared memory twice, in 8 bits, and a slot is free again before the products have ended. Nothing else is done to a tile:
scales of keys multiply the scores, and scales of values the weights.

A thread reads what is adjacent in shared memory. So the dimensions of keys and queries, and those of the results, are
in another order in the products than in memory.

Float16 has fewer powers of two than bfloat16. So queries are divided by a power of two near their largest element, and
the largest weight of a head is near 2^14 instead of 1. Weights go down to 2^-38 of the largest.

Shape legend: B rows that may be decodes, K KV heads, D head size, N pages of G tokens, P pages of a table.

Gluon checks fields of an aggregate against their annotations, so these must be classes, not strings.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from nanoflow.kernels.hopper.attention_programs import (
    MAX_GROUP,
    PANEL,
    Results,
    Sums,
    no_sums,
    with_sink,
    write_dims,
    write_log_sums,
)
from nanoflow.kernels.hopper.loads import PAGE_TOKENS, fill_ring
from nanoflow.kernels.hopper.rings import make_ring
from nanoflow.kernels.hopper.walk import Rows, run_of_program

_GROUP: gl.constexpr = gl.constexpr(MAX_GROUP)
_PAGE: gl.constexpr = gl.constexpr(PAGE_TOKENS)
_PANEL: gl.constexpr = gl.constexpr(PANEL)
# Words between the scales of two pages in shared memory, as a copy needs an address that is a multiple of 128 bytes.
_WORDS: gl.constexpr = gl.constexpr(2 * PAGE_TOKENS)
# log2 of the largest weight, about, and of the largest element of a query: float16 ends at 2^16. And of the least scale
# of a value that counts for the peak: with less, sums of powers would exceed float32.
_WEIGHT: gl.constexpr = gl.constexpr(14.0)
_QUERY: gl.constexpr = gl.constexpr(14.0)
_LEAST_LOG: gl.constexpr = gl.constexpr(-80.0)


@aggregate
class Memory8:
    """Shared memory of an attention.

    Attributes:
        queries: float16 [MAX_GROUP, D], dimensions in the order of `key_tile`.
        keys, values: float8_e4m3fn [slots, BLOCK, D].
        scales: int32 [slots x BLOCK / G, 2, G], of each page two bfloat16 a word, then nothing.
        weights: float16 [MAX_GROUP, BLOCK], of one block of keys for each query.
    """

    queries: gl.shared_memory_descriptor
    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, queries, keys, values, scales, weights):
        self.queries, self.keys, self.values, self.scales, self.weights = queries, keys, values, scales, weights


@gluon.jit
def _make_memory8(STAGES: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr):
    """Memory for the queries of one head and STAGES slots of keys and values."""
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=HEAD_DIM, element_bitwidth=8, rank=2)
    small: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    keys = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK, HEAD_DIM], tile)
    values = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK, HEAD_DIM], tile)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES * (BLOCK // _PAGE), 2, _PAGE], words)
    queries = gl.allocate_shared_memory(gl.float16, [_GROUP, HEAD_DIM], small)
    weights = gl.allocate_shared_memory(gl.float16, [_GROUP, BLOCK], small)
    return Memory8(queries, keys, values, scales, weights)


@gluon.constexpr_function
def _key_layout(HEAD_DIM):
    """Of [BLOCK, D]: a thread has 16 or 32 adjacent dimensions of two keys."""
    adjacent = [[0, 1 << bit] for bit in range((HEAD_DIM // 4).bit_length() - 1)]
    lanes = [[0, HEAD_DIM // 4], [0, HEAD_DIM // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*adjacent, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, HEAD_DIM])


@gluon.constexpr_function
def _value_layout(HEAD_DIM):
    """Of [D, BLOCK]: a thread has two or four adjacent dimensions of 16 keys."""
    each = HEAD_DIM // 32
    adjacent = [[1 << bit, 0] for bit in range(each.bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [each, 0], [2 * each, 0], [4 * each, 0]]
    warps = [[8 * each, 0], [16 * each, 0]]
    return gl.DistributedLinearLayout([*adjacent, [0, 1], [0, 8], [0, 16], [0, 32]], lanes, warps, [], [HEAD_DIM, 64])


@gluon.constexpr_function
def _result_layout(HEAD_DIM):
    """Of [D, MAX_GROUP]: a thread has two or four adjacent dimensions of two queries."""
    each = HEAD_DIM // 32
    adjacent = [[1 << bit, 0] for bit in range(each.bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [each, 0], [2 * each, 0], [4 * each, 0]]
    warps = [[8 * each, 0], [16 * each, 0]]
    return gl.DistributedLinearLayout([*adjacent, [0, 1]], lanes, warps, [], [HEAD_DIM, 8])


@gluon.constexpr_function
def _scale_layout():
    """Of [BLOCK / G, G]: that of the keys in the scores."""
    lanes = [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout([[0, 8]], lanes, [[1, 0], [2, 0]], [], [4, 16])


@gluon.jit
def key_tile(keys, HEAD_DIM: gl.constexpr, left: gl.constexpr):
    """Keys [BLOCK, D] of a slot as a left factor, in float16.

    Dimension t D / 4 + 4 j + 2 h + e of memory is dimension 16 j + 8 h + 2 t + e of the factor.
    """
    tile = keys.load(_key_layout(HEAD_DIM)).to(gl.float16)
    tile = tile.reshape([64, 4, HEAD_DIM // 16, 2, 2]).permute(0, 2, 3, 1, 4).reshape([64, HEAD_DIM])
    return gl.convert_layout(tile, left)


@gluon.jit
def value_tiles(values, PANELS: gl.constexpr, left: gl.constexpr):
    """Values [D, BLOCK] in registers as one or two left factors [PANEL, BLOCK], in float16.

    With n = D / 32, dimension n (8 w + g) + 2 p + r of memory is dimension 16 w + 8 r + g of factor p.
    """
    wide = values.to(gl.float16).reshape([4, 8, PANELS, 2, 64]).permute(0, 3, 1, 4, 2)
    if PANELS == 1:
        low = gl.convert_layout(wide.reshape([64, 64]), left)
        return low, low
    else:  # noqa: RET505  (Triton compiles one of the branches)
        low, high = wide.reshape([64, 64, 2]).split()
        return gl.convert_layout(low, left), gl.convert_layout(high, left)


@gluon.jit
def _close_head8(results, sums, cursor, rows, is_last, has_begin, PANELS: gl.constexpr, mma: gl.constexpr):
    """`close_head`, for sums whose dimensions are in the order of `value_tiles`."""
    HEAD_DIM: gl.constexpr = PANELS * _PANEL
    layout: gl.constexpr = _result_layout(HEAD_DIM)
    denominators = gl.sum(sums.total, 0)
    both = sums.low
    if PANELS == 2:
        both = gl.join(sums.low, sums.high)
    both = both.reshape([4, 2, 8, _GROUP, PANELS]).permute(0, 2, 4, 1, 3).reshape([HEAD_DIM, _GROUP])
    both, over = gl.convert_layout(both, layout), gl.convert_layout(denominators, gl.SliceLayout(0, layout))
    write_dims(results, both, over, cursor, rows, is_last, has_begin, 0, HEAD_DIM, layout)
    write_log_sums(results, sums.peak + gl.log2(denominators), is_last, has_begin, mma)


@gluon.jit
def _load_queries8(q, tile, GROUP: gl.constexpr, rows, cursor, HEAD_DIM: gl.constexpr, mma: gl.constexpr):
    """Load the queries of one KV head of one row into shared memory, each divided by a power of two; returns these."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    heads = gl.arange(0, _GROUP, gl.SliceLayout(1, layout))
    places = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    dims = places // 2 % 4 * (HEAD_DIM // 4) + places // 16 * 4 + places // 8 % 2 * 2 + places % 2
    first = (cursor.row * rows.KV_HEADS + cursor.head) * GROUP
    cells = (first + heads)[:, None] * HEAD_DIM + dims[None, :]
    queries = gl.load(q + cells, mask=(heads < GROUP)[:, None], other=0.0).to(gl.float32)
    power = gl.floor(gl.log2(gl.maximum(gl.max(gl.abs(queries), 1), 1e-30))) - _QUERY
    tile.store((queries * gl.exp2(-power)[:, None]).to(gl.float16))
    fence_async_shared()
    return gl.convert_layout(gl.exp2(power), gl.SliceLayout(0, mma))


@gluon.jit
def _scales_of(scales, slot, rows, mma: gl.constexpr):
    """Scales of the keys and of the values of a slot, and about log2 of the latter, float32 [BLOCK] each."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PAGES: gl.constexpr = rows.BLOCK // _PAGE
    words = scales._reinterpret(gl.int32, [scales.shape[0] // PAGES, PAGES, _WORDS], flat).index(slot)
    both = words.slice(0, _PAGE, dim=1).load(_scale_layout()).reshape([rows.BLOCK])
    both = gl.convert_layout(both, gl.SliceLayout(1, mma))
    of_values = both & -0x10000
    # The bits of a float32 as a number: its exponent counts from 127, and digits below it grow nearly as log2.
    logs = gl.maximum(of_values.to(gl.float32) * 2.0**-23 - 127.0, _LEAST_LOG)
    return (both << 16).to(gl.float32, bitcast=True), of_values.to(gl.float32, bitcast=True), logs


@gluon.jit
def _with_block8(sums, scores, values, value_scales, value_logs, memory, PANELS: gl.constexpr, left: gl.constexpr):
    """Add a block of keys with these scores to the sums.

    A value's weight is 2^(score - peak) times its scale. The peak is so that the largest is about 2^_WEIGHT.
    """
    peak = gl.maximum(sums.peak, gl.max(scores + (value_logs - _WEIGHT)[:, None], 0))
    decay = gl.exp2(sums.peak - peak)
    powers = gl.exp2(scores - peak[None, :])
    total = sums.total * decay[None, :] + powers
    tile = memory.weights.permute((1, 0))
    tile.store((powers * value_scales[:, None]).to(gl.float16))
    fence_async_shared()
    low_values, high_values = value_tiles(values, PANELS, left)
    low, high = warpgroup_mma(low_values, tile, sums.low * decay[None, :], is_async=True), sums.high
    if PANELS == 2:
        high = warpgroup_mma(high_values, tile, high * decay[None, :], is_async=True)
        low, high = warpgroup_mma_wait(0, deps=[low, high])
    else:
        low = warpgroup_mma_wait(0, deps=[low])
    return Sums(peak, total, low, high)


@gluon.jit
def _attend8(results, sinks, q, memory, ring, rows, cursor, num_steps, log2_scale, HEAD_DIM: gl.constexpr):
    """Consume the ring: a running softmax over the blocks of one head of one request after the other."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _GROUP, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    PANELS: gl.constexpr = HEAD_DIM // _PANEL
    sums = no_sums(-1e30, rows.BLOCK, mma)
    factors = gl.zeros([_GROUP], gl.float32, gl.SliceLayout(0, mma))
    is_new = num_steps > 0
    # The addition makes `first_block` a separate variable: the compiler would take a plain copy for an alias of
    # `block`.
    first_block = cursor.block + 0 * num_steps
    for step in range(num_steps):
        slot = step % ring.STAGES
        # 1. Load queries for a new head or request.
        if is_new:
            factors = _load_queries8(q, memory.queries, results.GROUP, rows, cursor, HEAD_DIM, mma) * log2_scale
            sums = no_sums(-1e30, rows.BLOCK, mma)
            first_block = cursor.block + 0 * step
        # 2. Scores; then nothing is left in the slot that is not in registers.
        ring.wait(step)
        keys = key_tile(memory.keys.index(slot), HEAD_DIM, left)
        products = gl.zeros([rows.BLOCK, _GROUP], gl.float32, mma)
        products = warpgroup_mma(keys, memory.queries.permute((1, 0)), products, is_async=True)
        values = memory.values.index(slot).permute((1, 0)).load(_value_layout(HEAD_DIM))
        key_scales, value_scales, value_logs = _scales_of(memory.scales, slot, rows, mma)
        ring.release(step)
        scores = warpgroup_mma_wait(0, deps=[products]) * (key_scales[:, None] * factors[None, :])
        is_last = cursor.ends_head(rows)
        if cursor.is_partial(rows):
            exists = cursor.exists(rows, gl.SliceLayout(1, mma))
            scores = gl.where(exists[:, None], scores, float("-inf"))
            # What stands behind a context may be NaN, and 0 times NaN is NaN.
            value_scales = gl.where(exists, value_scales, 0.0)
            is_value = cursor.exists(rows, gl.SliceLayout(0, _value_layout(HEAD_DIM)))
            values = gl.where(is_value[None, :], values, 0.0)
        # 3. Running softmax and values.
        sums = _with_block8(sums, scores, values, value_scales, value_logs, memory, PANELS, left)
        # 4. Write the result if the head or this run ends.
        is_new = is_last
        if is_last | (step + 1 == num_steps):
            sums = with_sink(sums, sinks, cursor, results.GROUP, first_block == 0, mma)
            _close_head8(results, sums, cursor, rows, is_last, first_block == 0, PANELS, mma)
        cursor = cursor.next(rows)


@gluon.jit(do_not_specialize=["table_stride", "first_row", "num_rows"])
def decode_fp8_program(
    out, parts, log_sums, q, keys, values, scales, page_tables, sinks, context_len, key_blocks, table_stride, first_row,
    num_rows, log2_scale,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SCAN: gl.constexpr, WARPS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """`attention_programs.decode_program` for keys and values in 8 bits; `scales` are words [N x K, G]."""
    rows = Rows(context_len, key_blocks, first_row, num_rows, KV_HEADS, BLOCK)
    cursor, num_steps = run_of_program(rows, SCAN, WARPS)
    memory = _make_memory8(STAGES, HEAD_DIM, BLOCK)
    ring = make_ring(STAGES)
    ring.init(1)
    fence_async_shared()
    results = Results(out, parts, log_sums, gl.program_id(0), GROUP)
    SLOT_BYTES: gl.constexpr = BLOCK * (2 * HEAD_DIM + 4)
    gl.warp_specialize(
        [
            (_attend8, (results, sinks, q, memory, ring, rows, cursor, num_steps, log2_scale, HEAD_DIM)),
            (
                fill_ring,
                (
                    keys, values, scales, memory, ring, page_tables, table_stride, rows, cursor, num_steps,
                    1, HEAD_DIM, SLOT_BYTES,
                ),
            ),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip
