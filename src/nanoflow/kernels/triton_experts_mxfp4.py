"""Grouped products of a mixture of experts with weights in MXFP4, which are unpacked in the kernel (Triton, Hopper).

As in `triton_experts.py` each is one persistent launch for all experts, and tiles are found in the same way. A tile is
computed transposed: weights are the left factor, which a warpgroup may have in registers, so numbers that were unpacked
do not pass through shared memory, and as few as 8 rows are a product of warpgroups. Words and scales are loaded by TMA.
`models/mxfp4.py` lays words out so that each thread finds in its words the numbers that it multiplies.

A word takes some 10 instructions to become four pairs of bfloat16 numbers, and 4 to multiply these by their scale. At
4.8 TB/s a multiprocessor of an H200 reads 4.8 words in a cycle, which is work for 68 of its 128 lanes. So reading
bounds the time with few rows, if there are always warps that can go on. `dot_scaled` of Triton 3.6 takes twice as many
instructions on this card, as its words have the order of the checkpoint. The references are in `reference_mxfp4.py`.

Shape legend: T tokens, E experts, K experts of a token, H width of the model, I width of an expert; T x K rows, sorted
by expert.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.graph.operation import OpKind
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.mxfp4_tiles import WHOLE_CARD, Mxfp4Tiles, choose_mxfp4_tiles
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_expert_sums import activated, alpha_and_limit, bias_of, clamped_of
from nanoflow.kernels.triton_experts import _found, _tile_ends, _write_rows

_ALIGNMENT_BYTES = 16


def experts_in_mxfp4(launch: Launch) -> None:
    """activation [T, K x I], seen as [T x K, I] in the experts' order: the activation of x [T, H] of each row's token.

    Weights are words int32 [E, 2 I, H / 8], scales uint8 [E, H / 32, 2 I], and perhaps biases [E, 2 I].

    Raises:
        ValueError: See `run_experts_in`.
    """
    experts_in_on(launch, WHOLE_CARD, card_of(launch.reads[0].device).num_sms)


def experts_out_mxfp4(launch: Launch) -> None:
    """out [T, K x H], seen as [T x K, H] in the tokens' order: the product of each row with its expert's matrix.

    Weights are words int32 [E, H, I / 8], scales uint8 [E, I / 32, H], and perhaps biases [E, H].

    Raises:
        ValueError: See `run_experts_in`.
    """
    experts_out_on(launch, WHOLE_CARD, card_of(launch.reads[0].device).num_sms)


def experts_in_on(launch: Launch, candidates: tuple[Mxfp4Tiles, ...], num_sms: int) -> None:
    """`experts_in_mxfp4` on so many multiprocessors, with tiles from these candidates."""
    tiles = _chosen(launch, candidates)
    run_experts_in(launch, tiles, num_sms * tiles.programs_per_sm)


def experts_out_on(launch: Launch, candidates: tuple[Mxfp4Tiles, ...], num_sms: int) -> None:
    """`experts_out_mxfp4` on so many multiprocessors, with tiles from these candidates."""
    tiles = _chosen(launch, candidates)
    run_experts_out(launch, tiles, num_sms * tiles.programs_per_sm)


def _chosen(launch: Launch, candidates: tuple[Mxfp4Tiles, ...]) -> Mxfp4Tiles:
    """By the rows that an expert has on average."""
    limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
    return choose_mxfp4_tiles(candidates, launch.reads[1].numel() / len(launch.weights[0]), limit_bytes)


def run_experts_in(launch: Launch, tiles: Mxfp4Tiles, num_programs: int) -> None:
    """`experts_in_mxfp4` with given tiles and number of programs.

    Raises:
        ValueError: Rows are not bfloat16 or not aligned to 16 bytes.
    """
    (x, rows, ends), (activation,), (words, scales, *biases) = launch.reads, launch.writes, launch.weights
    num_experts, doubled, per_row = words.shape
    out = activation.view(rows.numel(), -1)
    _check_rows(x, out)
    _experts_in[(num_programs,)](
        *(x, _words_of(words, tiles), _scales_of(scales, tiles), biases[0] if biases else None),
        *(out, rows, ends),
        *(rows.shape[1], doubled // 2, 8 * per_row),
        *(num_experts, triton.next_power_of_2(num_experts)),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.is_flat),
        *alpha_and_limit(clamped_of(launch)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def run_experts_out(launch: Launch, tiles: Mxfp4Tiles, num_programs: int) -> None:
    """`experts_out_mxfp4` with given tiles and number of programs.

    Raises:
        ValueError: As `run_experts_in`.
    """
    (activation, rows, ends), (by_token,), (words, scales, *biases) = launch.reads, launch.writes, launch.weights
    num_experts, num_columns, per_row = words.shape
    x, out = activation.view(rows.numel(), -1), by_token.view(rows.numel(), -1)
    _check_rows(x, out)
    _experts_out[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        *(_words_of(words, tiles), _scales_of(scales, tiles), biases[0] if biases else None),
        *(out, rows, ends),
        *(num_columns, 8 * per_row),
        *(num_experts, triton.next_power_of_2(num_experts)),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.is_flat),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _words_of(words: Tensor, tiles: Mxfp4Tiles) -> TensorDescriptor:
    """Boxes of the rows of all experts."""
    return TensorDescriptor.from_tensor(words.flatten(0, 1), [tiles.block_n, tiles.block_k // 8])


def _scales_of(scales: Tensor, tiles: Mxfp4Tiles) -> TensorDescriptor:
    """Boxes of the groups of all experts."""
    return TensorDescriptor.from_tensor(scales.flatten(0, 1), [tiles.block_k // 32, tiles.block_n])


def _check_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"rows of type {tensor.dtype}; products of weights in MXFP4 take bfloat16")
        row_bytes = tensor.stride(0) * tensor.element_size()
        if tensor.stride(1) != 1 or row_bytes % _ALIGNMENT_BYTES or tensor.data_ptr() % _ALIGNMENT_BYTES:
            raise ValueError(f"rows every {row_bytes} bytes; they must begin at multiples of {_ALIGNMENT_BYTES} bytes")


@triton.jit
def _experts_in(
    x: tl.tensor,
    words: tl.tensor_descriptor,
    scales: tl.tensor_descriptor,
    bias: tl.tensor | None,
    out: tl.tensor,
    rows: tl.tensor,
    ends: tl.tensor,
    rows_per_token: int,
    num_columns: int,
    FEATURES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_FLAT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    """Words are [E x 2 I, H / 8], scales [E x H / 32, 2 I]; eight gates and eight of up alternate.

    The number of steps is known when it is compiled. Otherwise sums might be those of no step, and the assembler would
    have each product wait for the one before.
    """
    tiles_n = tl.cdiv(2 * num_columns, BLOCK_N)
    tile_ends = _tile_ends(ends, tiles_n, NUM_EXPERTS, EXPERTS, BLOCK_M)
    features = tl.arange(0, BLOCK_K)
    num_tiles = tl.max(tile_ends)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_FLAT):
        expert, first, stop, column = _found(tile, num_tiles, tile_ends, ends, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        places = first + tl.arange(0, BLOCK_M)
        is_own = places < stop
        token = tl.load(rows + places, mask=is_own, other=0) // rows_per_token
        source = x + token.to(tl.int64)[:, None] * FEATURES + features[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for feature in range(0, FEATURES, BLOCK_K):
            numbers = _numbers(
                words.load([2 * expert * num_columns + column, feature // 8]),
                scales.load([expert * (FEATURES // 32) + feature // 32, column]),
                BLOCK_N,
                BLOCK_K,
            )
            if FEATURES % BLOCK_K == 0:
                cells = tl.load(source + feature)
            else:
                cells = tl.load(source + feature, mask=(feature + features < FEATURES)[None, :], other=0.0)
            acc = _finished(tl.dot(numbers, cells.T, acc))
        HALF: tl.constexpr = BLOCK_N // 2
        gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        gate, up = gate.reshape(HALF, BLOCK_M), up.reshape(HALF, BLOCK_M)
        column //= 2
        if bias is not None:
            columns, of_gate = column + tl.arange(0, HALF), 2 * expert * num_columns
            gate += bias_of(bias, of_gate, columns, num_columns)[:, None]
            up += bias_of(bias, of_gate + num_columns, columns, num_columns)[:, None]
        cells = activated(gate, up, out.dtype.element_ty, ALPHA, LIMIT)
        _write_rows(out, places, is_own, column, num_columns, cells.T, BLOCK_M, HALF, HALF)


@triton.jit
def _experts_out(
    x: tl.tensor_descriptor,
    words: tl.tensor_descriptor,
    scales: tl.tensor_descriptor,
    bias: tl.tensor | None,
    out: tl.tensor,
    rows: tl.tensor,
    ends: tl.tensor,
    num_columns: int,
    FEATURES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_FLAT: tl.constexpr,
) -> None:
    """Words are [E x H, I / 8], scales [E x I / 32, H]. Columns that are the next expert's are not written."""
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    tile_ends = _tile_ends(ends, tiles_n, NUM_EXPERTS, EXPERTS, BLOCK_M)
    num_tiles = tl.max(tile_ends)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_FLAT):
        expert, first, stop, column = _found(tile, num_tiles, tile_ends, ends, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for feature in range(0, FEATURES, BLOCK_K):
            numbers = _numbers(
                words.load([expert * num_columns + column, feature // 8]),
                scales.load([expert * (FEATURES // 32) + feature // 32, column]),
                BLOCK_N,
                BLOCK_K,
            )
            acc = _finished(tl.dot(numbers, x.load([first, feature]).T, acc))
        places = first + tl.arange(0, BLOCK_M)
        is_own = places < stop
        row = tl.load(rows + places, mask=is_own, other=0)
        if bias is not None:
            acc += bias_of(bias, expert * num_columns, column + tl.arange(0, BLOCK_N), num_columns)[:, None]
        _write_rows(out, row, is_own, column, num_columns, acc.T, BLOCK_M, BLOCK_N, BLOCK_N)


@triton.jit
def _numbers(words: tl.tensor, scales: tl.tensor, ROWS: tl.constexpr, FEATURES: tl.constexpr) -> tl.tensor:
    """bfloat16 [ROWS, FEATURES] of words int32 [ROWS, FEATURES / 8] and scales uint8 [FEATURES / 32, ROWS].

    The order of the dimensions follows from `models/mxfp4.py`: of word q, pair a + 2 b has the numbers from
    2 q + 8 a + 16 b on.
    """
    GROUPS: tl.constexpr = FEATURES // 32
    IN_PLACE: tl.constexpr = 0x81C081C0 - (1 << 32)
    SIGNS: tl.constexpr = 0x80008000 - (1 << 32)
    # A pair of 2^(s - 1), as bfloat16, in each of the four words of a group.
    factors = ((scales.to(tl.int32) + 126) * 0x00800080).T
    factors = tl.broadcast_to(factors[:, :, None], (ROWS, GROUPS, 4)).reshape(ROWS, FEATURES // 8)
    last = ((words << 1) & SIGNS) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    first = tl.join(_pair(words & IN_PLACE, factors), _pair((words << 3) & IN_PLACE, factors))
    second = tl.join(_pair((words << 6) & IN_PLACE, factors), _pair(last, factors))
    pairs = tl.join(first, second).reshape(ROWS, GROUPS, 4, 2, 2, 2)
    return pairs.permute(0, 1, 5, 4, 2, 3).reshape(ROWS, FEATURES)


@triton.jit
def _pair(pairs: tl.tensor, factors: tl.tensor) -> tl.tensor:
    """bfloat16 [..., 2]: both numbers of each pair, times its factors; the lower half is the first."""
    exact = _times(pairs, factors)
    low = exact.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (exact >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _finished(sums: tl.tensor) -> tl.tensor:
    """The sums, once the products that make them have been computed; no instruction besides the wait.

    These products run while a program goes on, and read the left factor from registers. Triton 3.6 does not wait for
    those of one step before the next one writes its numbers to the same registers, unless the sums are used before.
    """
    return tl.inline_asm_elementwise("", "=f,0", [sums], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _times(pairs: tl.tensor, factors: tl.tensor) -> tl.tensor:
    """Products of both halves of words, which are bfloat16 numbers. Written apart they would be moved to be paired."""
    return tl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [pairs, factors], dtype=tl.int32, is_pure=True, pack=1
    )


TRITON_MXFP4_KERNELS: dict[OpKind, Kernel] = {
    OpKind.EXPERTS_IN_MXFP4: experts_in_mxfp4,
    OpKind.EXPERTS_OUT_MXFP4: experts_out_mxfp4,
}
