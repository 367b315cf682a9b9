"""Decode attention for any share of a Hopper card, in Gluon; the reference is `reference.decode_attention`.

The tensor memory accelerator (TMA) copies keys page by page into a ring of slots in shared memory, and keys are the
rows of the products. So a step takes few instructions, and an SM reads as fast as it can, about 47 bytes a clock: a
quarter of the SMs reads keys at two thirds of the whole card's speed. Each program takes an equal run of blocks of keys
across requests and KV heads, so uneven lengths are balanced. A second kernel (`merge.py`) merges the parts of a head
that several programs computed. Keys and values in 8 bits have a program of their own (`attention_fp8_programs.py`).

Shape legend: T tokens, B rows that may be decodes, H heads, K KV heads, D head size, N pages, G tokens of a page.
"""

# mypy: allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoflow.graph.operation import KEY_BLOCK, AttentionDims, KvType
from nanoflow.kernels import triton_attention
from nanoflow.kernels.hopper.attention_fp8_programs import decode_fp8_program
from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS, PANEL, decode_program
from nanoflow.kernels.hopper.merge import SCAN, run_merge
from nanoflow.kernels.launch import Launch, LayerCache
from nanoflow.kernels.triton_attention import LOG2_E, card_of

# Of a program: one warp loads, four compute.
NUM_WARPS = 4
# Beside a product there is room for one program of an SM.
PROGRAMS_BESIDE = 1
_HOPPER = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """How programs share an SM; with several, their softmaxes overlap.

    Attributes:
        programs_per_sm: Programs for each SM.
        num_stages: Blocks of keys and values in shared memory, for each program.
        max_registers: Registers of a thread when the program starts; the loading warps then give some to the others.
        loader_registers: Registers of a thread of the loading warps.
    """

    programs_per_sm: int
    num_stages: int
    max_registers: int
    loader_registers: int


OCCUPANCIES = {
    KvType.MODEL: Occupancy(programs_per_sm=3, num_stages=2, max_registers=72, loader_registers=40),
    # Blocks have half of the bytes, so more of them must be on their way at a time.
    KvType.FP8: Occupancy(programs_per_sm=4, num_stages=3, max_registers=64, loader_registers=24),
}


def can_attend(device: torch.device, dtype: torch.dtype, dims: AttentionDims) -> bool:
    """Whether the kernel supports these heads on this device.

    It does on Hopper, with 16-bit types of the model, head size 64 or 128, and no window.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == _HOPPER
        and dtype in (torch.bfloat16, torch.float16)
        and dims.head_dim in (PANEL, 2 * PANEL)
        and dims.num_heads // dims.num_kv_heads <= MAX_GROUP
        and dims.window is None
    )


def decode_attention(launch: Launch) -> None:
    """Attention of one query per request over its pages, out [B, H x D], on the whole card."""
    decode_attention_on(launch, card_of(launch.reads[0].device).num_sms)


def decode_attention_on(launch: Launch, num_sms: int, programs_per_sm: int | None = None) -> None:
    """`decode_attention` for a stream with `num_sms` SMs.

    With a window, or for pages of other than 16 tokens, the Triton kernel runs.
    """
    dims, cache = launch.op.dims, launch.cache
    assert isinstance(dims, AttentionDims) and cache is not None
    if cache.keys.shape[2] == PAGE_TOKENS and dims.window is None:
        run_decode(launch, (programs_per_sm or OCCUPANCIES[dims.kv_type].programs_per_sm) * num_sms)
    else:
        triton_attention.decode_attention(launch)


def run_decode(launch: Launch, num_programs: int, occupancy: Occupancy | None = None) -> None:
    """`decode_attention` by a given number of programs.

    Raises:
        ValueError: The tensors are not contiguous, or pages do not have 16 tokens.
    """
    dims, cache, decodes = launch.op.dims, launch.cache, launch.inputs.decodes
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (out,), tables = launch.reads, launch.writes, launch.pages.decode_tables
    check(q, out, cache)
    occupancy = occupancy or OCCUPANCIES[dims.kv_type]
    group = dims.num_heads // dims.num_kv_heads
    # Two entries for each program: the even one for a part without the beginning of its head, the odd one for a part
    # with it.
    parts = torch.empty((2 * num_programs, MAX_GROUP, dims.head_dim), dtype=torch.float32, device=q.device)
    log_sums = torch.empty((2 * num_programs, MAX_GROUP), dtype=torch.float32, device=q.device)
    program = {KvType.MODEL: decode_program, KvType.FP8: decode_fp8_program}[dims.kv_type]
    program[(num_programs,)](
        *(out, parts, log_sums, q, *_blocks_of(cache)),
        tables,
        launch.weights[0] if dims.has_sinks else None,
        decodes.context_len,
        decodes.key_blocks,
        tables.stride(0),
        launch.tokens.start,
        len(q),
        dims.scale * LOG2_E,
        GROUP=group,
        KV_HEADS=dims.num_kv_heads,
        HEAD_DIM=dims.head_dim,
        BLOCK=KEY_BLOCK,
        STAGES=occupancy.num_stages,
        SCAN=SCAN,
        WARPS=NUM_WARPS,
        LOADER_REGISTERS=occupancy.loader_registers,
        num_warps=NUM_WARPS,
        maxnreg=occupancy.max_registers,
    )
    run_merge(launch, parts, log_sums, num_programs)


def _blocks_of(cache: LayerCache) -> tuple[TensorDescriptor, ...]:
    """TMA descriptors of keys, of values and, in 8 bits, of their scales; a row is one head of one token, or page."""
    keys, values = (cells.view(-1, cells.shape[3]) for cells in (cache.keys, cache.values))
    if cache.scales is None:
        # A box is half of a page of one head.
        return boxes(keys, PAGE_TOKENS), boxes(values, PAGE_TOKENS)
    words = cache.scales.view(torch.int32).view(-1, PAGE_TOKENS)
    plain = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    whole = NVMMASharedLayout(swizzle_byte_width=keys.shape[1], element_bitwidth=8, rank=2)
    return (
        *(TensorDescriptor.from_tensor(cells, [PAGE_TOKENS, keys.shape[1]], whole) for cells in (keys, values)),
        TensorDescriptor.from_tensor(words, [1, PAGE_TOKENS], plain),
    )


def boxes(cells: Tensor, num_rows: int) -> TensorDescriptor:
    """A TMA descriptor of rows; each copy moves `num_rows` rows, 128 bytes of each."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(cells, [num_rows, PANEL], layout)


def check(q: Tensor, out: Tensor, cache: LayerCache) -> None:
    """Raise ValueError for tensors that the Hopper kernels do not support."""
    if cache.keys.shape[2] != PAGE_TOKENS:
        raise ValueError(f"a page of {cache.keys.shape[2]} tokens; this kernel takes {PAGE_TOKENS}")
    if not all(tensor.is_contiguous() for tensor in (q, out, *cache.parts)):
        raise ValueError("attention takes contiguous queries, outputs, keys and values")
