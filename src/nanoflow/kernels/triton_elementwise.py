"""Row-wise kernels in Triton, one launch each: norms, rotary embedding with cache append, SwiGLU, gathers of rows.

The references are the functions of the same names in `reference.py`, with the same rounding. All are bound by memory:
each element is read once and written once. Grids depend on shapes only, so a CUDA graph serves any batch of its size.
An index outside its target (token, row or slot), as padding has, reads zeros and writes nothing.

Shape legend: T tokens, S rows with logits, W width, V vocabulary, H heads, K KV heads, D head size, N pages, G tokens
of a page.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.graph.operation import AttentionDims, NormDims, OpKind, RowDims
from nanoflow.kernels.launch import Kernel, Launch, embedding_scale
from nanoflow.kernels.triton_kv_fp8 import quantised_heads

# For 2-byte elements: two 16-byte accesses in flight per thread and tensor, which hides latency at full occupancy.
_ELEMENTS_PER_THREAD = 16
_THREADS_PER_WARP = 32
_MAX_WARPS = 16
# Elements of a program if a row is divided; many small programs keep all SMs busy in a batch of decodes only.
_BLOCK = 2048


def rms_norm(launch: Launch) -> None:
    """normed = hidden / sqrt(mean(hidden^2) + eps) * weight, both [T, W]. One program per row."""
    assert isinstance(launch.op.dims, NormDims)
    (hidden,), (normed,) = launch.reads, launch.writes
    num_rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(num_rows,)](
        hidden, normed, launch.weights[0], launch.op.dims.eps, width, block, num_warps=_num_warps(block)
    )


@triton.jit
def _rms_norm(
    hidden: tl.tensor,
    normed: tl.tensor,
    weight: tl.tensor,
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    cells = tl.program_id(0).to(tl.int64) * WIDTH + columns
    exact = tl.load(hidden + cells, mask=is_inside, other=0.0).to(tl.float32)
    # Loaded before the sum, which every thread waits for.
    factors = tl.load(weight + columns, mask=is_inside, other=0.0)
    exact *= tl.rsqrt(tl.sum(exact * exact) / WIDTH + eps)
    tl.store(normed + cells, _weighted(exact, factors).to(normed.dtype.element_ty), mask=is_inside)


def rms_norm_add(launch: Launch) -> None:
    """hidden [T, W] += x / sqrt(mean(x^2) + eps) * weight, rounded before it is added. One program per row."""
    assert isinstance(launch.op.dims, NormDims)
    (x, _), (hidden,) = launch.reads, launch.writes
    num_rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    _add_rms_norm[(num_rows,)](
        x, hidden, launch.weights[0], launch.op.dims.eps, width, block, num_warps=_num_warps(block)
    )


@triton.jit
def _add_rms_norm(
    x: tl.tensor,
    hidden: tl.tensor,
    weight: tl.tensor,
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    cells = tl.program_id(0).to(tl.int64) * WIDTH + columns
    rows = tl.load(x + cells, mask=is_inside, other=0.0)
    before = tl.load(hidden + cells, mask=is_inside, other=0.0)
    factors = tl.load(weight + columns, mask=is_inside, other=0.0)
    exact = rows.to(tl.float32)
    exact *= tl.rsqrt(tl.sum(exact * exact) / WIDTH + eps)
    added = _weighted(exact, factors).to(before.dtype).to(tl.float32)
    tl.store(hidden + cells, (before.to(tl.float32) + added).to(before.dtype), mask=is_inside)


@triton.jit
def _weighted(exact: tl.tensor, factors: tl.tensor) -> tl.tensor:
    """Float32 rows rounded to the weight's dtype before the weight is multiplied, as models are trained.

    With a float32 weight nothing is rounded here.
    """
    product = exact.to(factors.dtype).to(tl.float32) * factors.to(tl.float32)
    return product.to(factors.dtype)


def rope_append(launch: Launch) -> None:
    """Split qkv [T, (H + 2 K) D], normalise q and k heads if the model does, rotate them, write k and v to the cache.

    For a token whose slot is outside the cache (padding) only q is written. A cache in 8 bits gets the numbers and
    scales of `kv_fp8.quantised`.
    """
    dims, cache, rotation = launch.op.dims, launch.cache, launch.rotation
    assert isinstance(dims, AttentionDims) and cache is not None and rotation is not None
    (qkv,), (q_out,) = launch.reads, launch.writes
    q_weight, k_weight = launch.weights or (None, None)
    num_pages, _, page_size, head_dim = cache.keys.shape
    num_heads, half = dims.num_heads + 2 * dims.num_kv_heads, head_dim // 2
    half_block = triton.next_power_of_2(half)
    rotated = rotation.cos.shape[1]
    head_block = min(triton.next_power_of_2(num_heads), max(1, _BLOCK // (2 * half_block)))
    rows = slice(launch.tokens.start, launch.tokens.stop)
    _rope_append[(len(qkv), triton.cdiv(num_heads, head_block))](
        *(qkv, q_out, cache.keys, cache.values, cache.scales),
        *(rotation.cos[rows], rotation.sin[rows], launch.pages.slots[rows], q_weight, k_weight),
        *(num_pages * page_size, dims.norm_eps or 0.0),
        *(dims.num_heads, dims.num_kv_heads, half, rotated, page_size, head_block, half_block),
        num_warps=_num_warps(2 * head_block * half_block),
    )


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rope_append(
    qkv: tl.tensor,
    q_out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor | None,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    q_weight: tl.tensor | None,
    k_weight: tl.tensor | None,
    num_slots: int,
    eps: float,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """One token, HEAD_BLOCK of its consecutive q, k and v heads; ROTATED pairs of each q and k head are rotated."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    is_column = columns < HALF
    is_query, is_value = heads < HEADS, heads >= HEADS + KV_HEADS
    is_inside = (heads < HEADS + 2 * KV_HEADS) & is_column
    low, gap = _pairs(columns, HALF, ROTATED)
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + heads) * 2 * HALF + low
    first = tl.load(source, mask=is_inside, other=0.0)
    second = tl.load(source + gap, mask=is_inside, other=0.0)
    x, y = first, second
    if q_weight is not None:
        x, y = _normalised_heads(x, y, q_weight, k_weight, is_query, eps, low, gap, HALF, HALF_BLOCK)
    x, y = x.to(tl.float32), y.to(tl.float32)
    cosine = tl.load(cos + token * ROTATED + columns, mask=columns < ROTATED)
    sine = tl.load(sin + token * ROTATED + columns, mask=columns < ROTATED)
    keeps = is_value
    if ROTATED < HALF:
        # A normalised head changes in its dimensions that are not rotated, too.
        first = tl.where(is_value, first, x.to(first.dtype))
        second = tl.where(is_value, second, y.to(second.dtype))
        keeps = is_value | (columns >= ROTATED)
    first = tl.where(keeps, first, (x * cosine - y * sine).to(first.dtype))
    second = tl.where(keeps, second, (y * cosine + x * sine).to(second.dtype))
    q_cells = q_out + (token * HEADS + heads) * 2 * HALF + low
    tl.store(q_cells, first, mask=is_query & is_column)
    tl.store(q_cells + gap, second, mask=is_query & is_column)
    slot = tl.load(slots + token).to(tl.int64)
    kv_head = heads - tl.where(is_value, HEADS + KV_HEADS, HEADS)
    row = ((slot // PAGE_SIZE) * KV_HEADS + kv_head) * PAGE_SIZE + slot % PAGE_SIZE
    kv_cells = tl.where(is_value, values, keys) + row * 2 * HALF + low
    is_appended = (heads >= HEADS) & (heads < HEADS + 2 * KV_HEADS) & (slot >= 0) & (slot < num_slots)
    if scales is not None:
        first, second, scale = quantised_heads(first, second, is_column)
        tl.store(scales + row * 2 + is_value.to(tl.int64), scale.to(scales.dtype.element_ty), mask=is_appended)
    tl.store(kv_cells, first, mask=is_appended & is_column)
    tl.store(kv_cells + gap, second, mask=is_appended & is_column)


@triton.jit
def _pairs(columns: tl.tensor, HALF: tl.constexpr, ROTATED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Index in a head of the first member of each pair, and the distance to the second.

    Pair i < ROTATED is (i, i + ROTATED). The dimensions after these are not rotated; their two halves form pairs too.
    """
    if ROTATED == HALF:
        return columns, HALF
    else:  # noqa: RET505  (Triton compiles one of two branches)
        is_rotated = columns < ROTATED
        return tl.where(is_rotated, columns, columns + ROTATED), tl.where(is_rotated, ROTATED, HALF - ROTATED)


@triton.jit
def _normalised_heads(
    first: tl.tensor,
    second: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    is_query: tl.tensor,
    eps: float,
    low: tl.tensor,
    gap: tl.tensor,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMSNorm of each head; input and output are the two members of its pairs [heads, HALF]."""
    is_column = tl.arange(0, HALF_BLOCK)[None, :] < HALF
    weight = tl.where(is_query, q_weight, k_weight) + low
    x, y = first.to(tl.float32), second.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x + y * y, axis=1, keep_dims=True) / (2 * HALF) + eps)
    x = _weighted(x * scale, tl.load(weight, mask=is_column, other=0.0))
    y = _weighted(y * scale, tl.load(weight + gap, mask=is_column, other=0.0))
    return x.to(first.dtype), y.to(second.dtype)


def swiglu(launch: Launch) -> None:
    """out [T, W] = silu(gate) * up, where the input [T, 2 W] has gate, then up."""
    (gate_up,), (out,) = launch.reads, launch.writes
    num_rows, width = out.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _swiglu[(num_rows, triton.cdiv(width, block))](gate_up, out, width, block, num_warps=_num_warps(block))


@triton.jit
def _swiglu(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    source = gate_up + row * 2 * WIDTH + columns
    gate = tl.load(source, mask=is_inside, other=0.0)
    up = tl.load(source + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    exact = gate.to(tl.float32)
    # Rounded between the two factors, as the separate operations of a model in this dtype do.
    activated = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (activated * up).to(gate.dtype), mask=is_inside)


def geglu(launch: Launch) -> None:
    """out [T, W] = gelu(gate) * up with the tanh form of GELU, where the input [T, 2 W] has gate, then up."""
    (gate_up,), (out,) = launch.reads, launch.writes
    num_rows, width = out.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _geglu[(num_rows, triton.cdiv(width, block))](gate_up, out, width, block, num_warps=_num_warps(block))


@triton.jit
def _geglu(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    source = gate_up + row * 2 * WIDTH + columns
    gate = tl.load(source, mask=is_inside, other=0.0)
    up = tl.load(source + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    exact = gate.to(tl.float32)
    # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)) with z = sqrt(2 / pi) (x + 0.044715 x^3).
    twice = 1.5957691216057308 * (exact + 0.044715 * exact * exact * exact)
    activated = (exact / (1.0 + tl.exp(-twice))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (activated * up).to(gate.dtype), mask=is_inside)


def embed(launch: Launch) -> None:
    """hidden [T, W] = embedding [V, W] of each token, times the operation's factor."""
    assert isinstance(launch.op.dims, RowDims)
    (hidden,) = launch.writes
    ids = launch.inputs.token_ids[launch.tokens.start : launch.tokens.stop]
    _launch_gather(ids, launch.weights[0], hidden, embedding_scale(launch.op.dims, hidden.dtype))


def gather_rows(launch: Launch) -> None:
    """Copy the rows that get logits out of the dense batch; the tensor read [T, W] has all rows here."""
    (source,), (target,) = launch.reads, launch.writes
    rows = launch.inputs.logit_tokens[launch.tokens.start : launch.tokens.stop]
    _launch_gather(rows, source, target)


def _launch_gather(rows: Tensor, source: Tensor, target: Tensor, scale: float = 1.0) -> None:
    num_rows, width = target.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _gather[(num_rows, triton.cdiv(width, block))](
        rows, source, target, len(source), width, block, scale, num_warps=_num_warps(block)
    )


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _gather(
    rows: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    num_sources: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
) -> None:
    """target[i] = source[rows[i]] * SCALE."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    row = tl.load(rows + place).to(tl.int64)
    is_read = is_inside & (row >= 0) & (row < num_sources)
    cells = tl.load(source + row * WIDTH + columns, mask=is_read, other=0.0)
    if SCALE != 1.0:
        cells = (cells.to(tl.float32) * SCALE).to(cells.dtype)
    tl.store(target + place * WIDTH + columns, cells, mask=is_inside)


def _num_warps(num_elements: int) -> int:
    """Number of warps of a program with this many elements (a power of two)."""
    return min(max(num_elements // (_ELEMENTS_PER_THREAD * _THREADS_PER_WARP), 1), _MAX_WARPS)


ELEMENTWISE_KERNELS: dict[OpKind, Kernel] = {
    OpKind.EMBED: embed,
    OpKind.GATHER_ROWS: gather_rows,
    OpKind.RMS_NORM: rms_norm,
    OpKind.RMS_NORM_ADD: rms_norm_add,
    OpKind.ROPE_APPEND: rope_append,
    OpKind.SWIGLU: swiglu,
    OpKind.GEGLU: geglu,
}
