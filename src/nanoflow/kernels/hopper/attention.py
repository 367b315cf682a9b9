"""Decode attention for any share of a Hopper card, in Gluon; the reference is `reference.decode_attention`.

The tensor memory accelerator (TMA) copies keys page by page into a ring of slots in shared memory, and keys are the
rows of the products. So a step takes few instructions, and an SM reads as fast as it can, about 47 bytes a clock: a
quarter of the SMs reads keys at two thirds of the whole card's speed. Each program takes an equal run of blocks of keys
across requests and KV heads, so uneven lengths are balanced. A second kernel (`merge.py`) merges the parts of a head
that several programs computed.

Shape legend: T tokens, B rows that may be decodes, H heads, K KV heads, D head size, N pages, G tokens of a page.
"""

# mypy: allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoflow.graph.operation import KEY_BLOCK, AttentionDims, KvType
from nanoflow.kernels import triton_attention
from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS, PANEL, decode_program
from nanoflow.kernels.hopper.merge import SCAN, run_merge
from nanoflow.kernels.launch import Launch, LayerCache
from nanoflow.kernels.triton_attention import LOG2_E, card_of

# With three programs an SM overlaps their softmaxes; registers and shared memory are limited for that. Beside a product
# there is room for one.
PROGRAMS_PER_SM, PROGRAMS_BESIDE = 3, 1
NUM_WARPS, NUM_STAGES, MAX_REGISTERS = 4, 2, 72
_HOPPER = 9


def can_attend(device: torch.device, dtype: torch.dtype, dims: AttentionDims) -> bool:
    """Whether the kernel supports these heads on this device.

    It does on Hopper, with 16-bit types of the model and of the cache, head size 64 or 128, and neither window nor
    sinks.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == _HOPPER
        and dtype in (torch.bfloat16, torch.float16)
        and dims.head_dim in (PANEL, 2 * PANEL)
        and dims.num_heads // dims.num_kv_heads <= MAX_GROUP
        and dims.window is None
        and not dims.has_sinks
        and dims.kv_type is KvType.MODEL
    )


def decode_attention(launch: Launch) -> None:
    """Attention of one query per request over its pages, out [B, H x D], on the whole card."""
    decode_attention_on(launch, card_of(launch.reads[0].device).num_sms)


def decode_attention_on(launch: Launch, num_sms: int, programs_per_sm: int = PROGRAMS_PER_SM) -> None:
    """`decode_attention` for a stream with `num_sms` SMs. For pages of other than 16 tokens the Triton kernel runs."""
    assert launch.cache is not None
    if launch.cache.keys.shape[2] == PAGE_TOKENS:
        run_decode(launch, programs_per_sm * num_sms)
    else:
        triton_attention.decode_attention(launch)


def run_decode(launch: Launch, num_programs: int) -> None:
    """`decode_attention` by a given number of programs.

    Raises:
        ValueError: The tensors are not contiguous, or pages do not have 16 tokens.
    """
    dims, cache, decodes = launch.op.dims, launch.cache, launch.inputs.decodes
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (out,), tables = launch.reads, launch.writes, launch.pages.decode_tables
    check(q, out, cache)
    group = dims.num_heads // dims.num_kv_heads
    # Two entries for each program: the even one for a part without the beginning of its head, the odd one for a part
    # with it.
    parts = torch.empty((2 * num_programs, MAX_GROUP, dims.head_dim), dtype=torch.float32, device=q.device)
    log_sums = torch.empty((2 * num_programs, MAX_GROUP), dtype=torch.float32, device=q.device)
    decode_program[(num_programs,)](
        out,
        parts,
        log_sums,
        q,
        # A row is one head of one token; a box is half of a page of one head.
        boxes(cache.keys.view(-1, dims.head_dim), PAGE_TOKENS),
        boxes(cache.values.view(-1, dims.head_dim), PAGE_TOKENS),
        tables,
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
        STAGES=NUM_STAGES,
        SCAN=SCAN,
        WARPS=NUM_WARPS,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )
    run_merge(launch, parts, log_sums, num_programs)


def boxes(cells: Tensor, num_rows: int) -> TensorDescriptor:
    """A TMA descriptor of rows; each copy moves `num_rows` rows, 128 bytes of each."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(cells, [num_rows, PANEL], layout)


def check(q: Tensor, out: Tensor, cache: LayerCache) -> None:
    """Raise ValueError for tensors that the Hopper kernels do not support."""
    if cache.keys.shape[2] != PAGE_TOKENS:
        raise ValueError(f"a page of {cache.keys.shape[2]} tokens; this kernel takes {PAGE_TOKENS}")
    if not all(tensor.is_contiguous() for tensor in (q, out, cache.keys, cache.values)):
        raise ValueError("attention takes contiguous queries, outputs, keys and values")
