"""Attention over the paged KV cache in Triton; references: `reference.decode_attention`, `reference.prefill_attention`.

This file divides the work among programs; the programs are in `triton_attention_programs.py`. Lengths and pages are
read on the device, and grids depend on shapes only, so a CUDA graph serves any mix of requests of its size. A request
with a context of 0 is padding, and its rows are not written.

Shape legend: T tokens, B requests, R prefill requests, H heads, K KV heads, D head size, N pages, G tokens a page.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nanoflow.graph.operation import AttentionDims
from nanoflow.kernels.launch import Launch, LayerCache
from nanoflow.kernels.triton_attention_programs import decode_program, merge_program, prefill_program

# Decode: wanted programs per SM, which even out different lengths; fewest keys of a part, so that its start and end are
# a small part of its time; most parts that one program merges.
_PROGRAMS_PER_SM = 16
_MIN_SPLIT_TOKENS = 256
_MAX_SPLITS = 64
# Bytes for page ids in flight, and for reductions over keys across warps.
_SCRATCH_BYTES = 2048
# Kernels compute powers of two instead of e.
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Tile sizes of a kernel: queries and keys of a step, warps of a program, steps in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_memory_bytes(self, head_dim: int, itemsize: int) -> int:
        """Upper bound of a program's shared memory: queries, weights, and keys and values of every step in flight."""
        in_flight = 2 * (self.num_stages - 1) * self.block_n
        elements = (self.block_m + in_flight) * int(triton.next_power_of_2(head_dim)) + self.block_m * self.block_n
        return elements * itemsize + _SCRATCH_BYTES


# Fastest first; the first that fits is used. With two or more programs an SM overlaps softmax and page look-ups.
DECODE_TILES = (
    Tiles(block_m=16, block_n=128, num_warps=4, num_stages=2),
    Tiles(block_m=16, block_n=64, num_warps=4, num_stages=3),
    Tiles(block_m=16, block_n=32, num_warps=4, num_stages=3),
    Tiles(block_m=16, block_n=16, num_warps=4, num_stages=2),
)
PREFILL_TILES = (
    Tiles(block_m=64, block_n=64, num_warps=4, num_stages=3),
    Tiles(block_m=64, block_n=32, num_warps=4, num_stages=2),
    Tiles(block_m=32, block_n=16, num_warps=4, num_stages=2),
)
# On 8 bits, which become 16 in registers: more keys at once take 0.68 to 0.84 of the time.
PREFILL_TILES_OF_8_BITS = (Tiles(block_m=64, block_n=128, num_warps=4, num_stages=3), *PREFILL_TILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Properties of a device that the tiling depends on."""

    num_sms: int
    shared_memory_bytes: int


@functools.cache
def card_of(device: torch.device) -> Card:
    """The properties of a device; for Triton's interpreter on CPU tensors, those of a small card."""
    if device.type == "cpu":
        return Card(num_sms=1, shared_memory_bytes=96 << 10)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Card(num_sms=properties["multiprocessor_count"], shared_memory_bytes=properties["max_shared_mem"])


def choose_tiles(candidates: Sequence[Tiles], head_dim: int, itemsize: int, limit_bytes: int) -> Tiles:
    """The first candidate that fits into `limit_bytes` of shared memory, else the last.

    float32 always gets the last: its products do not use tensor cores, and large tiles would exceed the registers.
    """
    if itemsize == 4:
        return candidates[-1]
    fitting = (tiles for tiles in candidates if tiles.shared_memory_bytes(head_dim, itemsize) <= limit_bytes)
    return next(fitting, candidates[-1])


def num_splits(num_rows: int, dims: AttentionDims, max_context: int, num_sms: int) -> int:
    """Parts that a context is divided into: enough programs for the card, no part too small; a power of two.

    It depends on shapes only; powers of two limit the number of compiled variants.
    """
    wanted = -(-_PROGRAMS_PER_SM * num_sms // (num_rows * dims.num_kv_heads))
    useful = max(1, min(wanted, max_context // _MIN_SPLIT_TOKENS, _MAX_SPLITS))
    return 1 << (useful.bit_length() - 1)


def can_attend(head_dim: int) -> bool:
    """Whether the kernels take heads of this size: their rows must be aligned to 16 bytes."""
    return 16 <= head_dim <= 256 and head_dim % 8 == 0


def decode_attention(launch: Launch) -> None:
    """Attention of one query per request over its pages, out [B, H x D]."""
    dims, cache = launch.op.dims, launch.cache
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (out,) = launch.reads, launch.writes
    _check(q, out, cache)
    card, tables = card_of(q.device), launch.pages.decode_tables
    tiles = choose_tiles(DECODE_TILES, dims.head_dim, q.element_size(), card.shared_memory_bytes // 2)
    splits = num_splits(len(q), dims, tables.shape[1] * cache.keys.shape[2], card.num_sms)
    run_decode(launch, tiles, splits)


def run_decode(launch: Launch, tiles: Tiles, splits: int) -> None:
    """`decode_attention` with given tiles; `splits`, the number of parts of a context, is a power of two."""
    dims, cache, inputs = launch.op.dims, launch.cache, launch.inputs
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (out,) = launch.reads, launch.writes
    shape = (len(q), dims.num_heads, splits)
    parts = out if splits == 1 else torch.empty((*shape, dims.head_dim), dtype=torch.float32, device=q.device)
    log_sums = None if splits == 1 else torch.empty(shape, dtype=torch.float32, device=q.device)
    decode_program[(dims.num_kv_heads, len(q), splits)](
        parts,
        log_sums,
        q,
        *(cache.keys, cache.values, _scale_words(cache)),
        launch.pages.decode_tables,
        launch.weights[0] if dims.has_sinks else None,
        inputs.decodes.context_len,
        launch.pages.decode_tables.stride(0),
        launch.tokens.start,
        dims.scale * LOG2_E,
        GROUP=dims.num_heads // dims.num_kv_heads,
        KV_HEADS=dims.num_kv_heads,
        HEAD_DIM=dims.head_dim,
        BLOCK_D=triton.next_power_of_2(dims.head_dim),
        PAGE_SIZE=cache.keys.shape[2],
        WINDOW=dims.window,
        IS_SPLIT=splits > 1,
        MIN_SPLIT=_MIN_SPLIT_TOKENS,
        BLOCK_M=max(tiles.block_m, triton.next_power_of_2(dims.num_heads // dims.num_kv_heads)),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        merge_program[(len(q) * dims.num_heads,)](
            out,
            parts,
            log_sums,
            inputs.decodes.context_len,
            launch.tokens.start,
            NUM_HEADS=dims.num_heads,
            HEAD_DIM=dims.head_dim,
            BLOCK_D=triton.next_power_of_2(dims.head_dim),
            NUM_SPLITS=splits,
        )


def prefill_attention(launch: Launch) -> None:
    """Causal attention of prompt chunks over their context so far."""
    dims, cache = launch.op.dims, launch.cache
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (out,) = launch.reads, launch.writes
    _check(q, out, cache)
    limit_bytes = card_of(q.device).shared_memory_bytes
    candidates = PREFILL_TILES if cache.scales is None else PREFILL_TILES_OF_8_BITS
    tiles = choose_tiles(candidates, dims.head_dim, q.element_size(), limit_bytes)
    run_prefill(launch, tiles)


def run_prefill(launch: Launch, tiles: Tiles) -> None:
    """`prefill_attention` with given tiles; reads nothing on the host."""
    dims, cache, inputs = launch.op.dims, launch.cache, launch.inputs
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (out,) = launch.reads, launch.writes
    prefills = inputs.prefills
    num_requests = len(prefills.context_len)
    prefill_program[(dims.num_heads, len(q) // tiles.block_m + num_requests)](
        out,
        q,
        *(cache.keys, cache.values, _scale_words(cache)),
        launch.pages.prefill_tables,
        launch.weights[0] if dims.has_sinks else None,
        prefills.query_start,
        prefills.context_len,
        launch.pages.prefill_tables.stride(0),
        num_requests,
        launch.tokens.start,
        launch.tokens.stop,
        dims.scale * LOG2_E,
        NUM_HEADS=dims.num_heads,
        KV_HEADS=dims.num_kv_heads,
        HEAD_DIM=dims.head_dim,
        BLOCK_D=triton.next_power_of_2(dims.head_dim),
        PAGE_SIZE=cache.keys.shape[2],
        WINDOW=dims.window,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _scale_words(cache: LayerCache) -> Tensor | None:
    """The scales of a key and of its value as one int32, [N, K, G, 1]; None for a cache without."""
    return None if cache.scales is None else cache.scales.view(torch.int32)


def _check(q: Tensor, out: Tensor, cache: LayerCache) -> None:
    head_dim = cache.keys.shape[3]
    if not can_attend(head_dim):
        raise ValueError(f"head size {head_dim} is no multiple of 8 from 16 to 256; use the reference kernel")
    if not all(tensor.is_contiguous() for tensor in (q, out, *cache.parts)):
        raise ValueError("attention takes contiguous queries, outputs, keys and values")
