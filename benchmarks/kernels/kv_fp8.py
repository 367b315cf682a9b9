"""Attention on a KV cache in 8 bits and on one in bfloat16, on this GPU: microseconds, GB/s, share of a copy's GB/s.

The kernel that the engine would choose for each and the Triton kernel, at several numbers of requests and contexts of
decode attention; prefill attention of chunks after contexts; and the kernel that writes the cache. Each point runs for
at least half a second as one CUDA graph, in turn on copies of the data that together are several times larger than the
L2 cache. Pages have random places. A copy of a GiB, whose bytes are counted once read and once written, says how much
the memory gives. `--sweep` also measures other tile sizes in Triton, and other numbers of programs and stages in Gluon,
on 8 bits.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.document import write_document
from benchmarks.kernels.attention import MIN_DATA_BYTES, PAGE_SIZE, Case, Work, batch_of, decodes, sustained_s
from nanoflow.cli.options import CommandParser
from nanoflow.executor.buffers import draw_keys
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, KvType, Operation, OpKind, Resource
from nanoflow.kernels import triton_attention
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.hopper import attention as hopper_attention
from nanoflow.kernels.hopper.attention import Occupancy
from nanoflow.kernels.kv_fp8 import FP8, SCALE
from nanoflow.kernels.launch import Kernel, Launch, LayerCache
from nanoflow.kernels.triton_attention import Tiles, card_of, num_splits, run_decode, run_prefill

DTYPE = torch.bfloat16
DECODES = tuple(
    decodes(f"{num} x {context}", num, context) for context in (1024, 4096) for num in (64, 128, 256, 512, 1024)
)
UNEVEN = decodes("340 x 1..2560", 340, 1280, is_ragged=True)
PREFILLS = (
    Case(name="4 x 512 after 1536", requests=((1536, 512),) * 4),
    *(
        Case(name=f"1 x {num_new} after {context}", requests=((context, num_new),))
        for context in (1024, 8192, 32768)
        for num_new in (512, 1024, 2048)
    ),
)
SWEPT = (decodes("256 x 1024", 256, 1024), decodes("256 x 4096", 256, 4096), UNEVEN)
SWEEP = tuple(
    Tiles(block_m=16, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
    for block_n, num_warps, num_stages in (
        (128, 4, 2),
        (128, 4, 3),
        (128, 4, 4),
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 5),
        (64, 2, 3),
        (32, 2, 4),
        (128, 8, 2),
        (128, 8, 3),
        (256, 8, 2),
    )
)

SWEPT_PREFILLS = (PREFILLS[4], PREFILLS[6])
PREFILL_SWEEP = tuple(
    Tiles(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
    for block_m, block_n, num_warps, num_stages in (
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 128, 4, 3),
        (64, 256, 4, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
    )
)
# Programs of an SM, stages, and registers of a thread at first and of loading warps: what fits on an SM. The last has
# too few registers for the computing warps, but most programs.
GLUON_SWEEP = tuple(
    Occupancy(programs_per_sm=programs, num_stages=stages, max_registers=registers, loader_registers=loader)
    for programs, stages, registers, loader in (
        (2, 4, 96, 40),
        (2, 6, 96, 40),
        (3, 2, 80, 40),
        (3, 3, 80, 40),
        (3, 4, 80, 40),
        (4, 2, 64, 24),
        (4, 3, 64, 24),
        (4, 3, 64, 32),
        (5, 2, 48, 24),
    )
)
COPIED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured time.

    `gb_per_s` counts every byte that the operation must move once, `of_copy` is its part of what a copy reaches, and
    `tflop_per_s` counts visible keys alone.
    """

    operation: str
    shape: str
    kv_type: KvType
    kernel: str
    time_us: float
    gb_per_s: float
    of_copy: float
    tflop_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    parser = CommandParser(prog="python -m benchmarks.kernels.kv_fp8", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--sweep", action="store_true", help="also measure other tile sizes and stages on 8 bits")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device())
    copied = copied_gb_per_s(device)
    print(f"a copy moves {copied:.0f} GB/s")
    print(f"{'operation':<18} {'requests':<22} {'type':<9} {'kernel':<34}", end="")
    print(f" {'us':>9} {'GB/s':>7} {'of copy':>7} {'TFLOP/s':>8}")
    points = list(measured(device, copied, sweeps=args.sweep))
    if args.json is not None:
        write_document(
            args.json,
            "kernels_kv_fp8",
            page_size=PAGE_SIZE,
            dtype="bfloat16",
            copied_gb_per_s=copied,
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def measured(device: torch.device, copied: float, *, sweeps: bool) -> Iterator[Point]:
    """Every point, printed as it is known; `copied` are the GB/s of a copy."""
    for case in (*DECODES, UNEVEN, *PREFILLS):
        for kv_type in KvType:
            op = typed(case.operation, kv_type)
            chosen = kernels_for(device, DTYPE, (op,))[op.kind]
            triton = triton_attention.decode_attention if case.is_decode else triton_attention.prefill_attention
            if chosen is not triton:
                yield measure(case, op, chosen, "Gluon", device, copied)
            yield measure(case, op, triton, "Triton", device, copied)
    for case in (decodes("1024 x 1", 1024, 1), Case(name="1 x 2048", requests=((0, 2048),))):
        for kv_type in KvType:
            dims = typed(case.operation, kv_type).dims
            op = Operation(
                name="rope_append",
                kind=OpKind.ROPE_APPEND,
                resource=Resource.MEMORY,
                reads=("qkv",),
                writes=("q", "kv"),
                dims=dims,
            )
            yield measure(case, op, kernels_for(device, DTYPE, (op,))[op.kind], "Triton", device, copied)
    for case in SWEPT if sweeps else ():
        op = typed(case.operation, KvType.FP8)
        for name, kernel in swept(device, op):
            yield measure(case, op, kernel, name, device, copied)
    for case in SWEPT_PREFILLS if sweeps else ():
        op = typed(case.operation, KvType.FP8)
        for tiles in PREFILL_SWEEP:
            name = f"Triton, m {tiles.block_m}, n {tiles.block_n}, {tiles.num_stages} stages"
            yield measure(case, op, partial(run_prefill, tiles=tiles), name, device, copied)


def swept(device: torch.device, op: Operation) -> Iterator[tuple[str, Kernel]]:
    """Other forms of decode attention: in Gluon where it can run, then in Triton."""
    assert isinstance(op.dims, AttentionDims)
    for cut in GLUON_SWEEP if hopper_attention.can_attend(device, DTYPE, op.dims) else ():
        registers = f"{cut.max_registers}/{cut.loader_registers}"
        yield f"Gluon, {cut.programs_per_sm} an SM, {cut.num_stages} stages, {registers}", partial(gluon_with, cut=cut)
    for tiles in SWEEP:
        name = f"Triton, n {tiles.block_n}, {tiles.num_warps} warps, {tiles.num_stages} stages"
        yield name, partial(decode_with, tiles=tiles)


def copied_gb_per_s(device: torch.device) -> float:
    """GB/s of a copy on the device, read and written."""
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(source)

    return 2 * COPIED_BYTES / sustained_s([copy]) / 1e9


def typed(op: Operation, kv_type: KvType) -> Operation:
    """The operation on a cache of this type."""
    assert isinstance(op.dims, AttentionDims)
    return dataclasses.replace(op, dims=dataclasses.replace(op.dims, kv_type=kv_type))


def decode_with(launch: Launch, tiles: Tiles) -> None:
    """Decode attention with other tiles, and as many parts of a context as the engine would make."""
    dims, tables = launch.op.dims, launch.pages.decode_tables
    assert isinstance(dims, AttentionDims)
    rows, num_sms = len(launch.reads[0]), card_of(tables.device).num_sms
    run_decode(launch, tiles, num_splits(rows, dims, tables.shape[1] * PAGE_SIZE, num_sms))


def gluon_with(launch: Launch, cut: Occupancy) -> None:
    """Decode attention in Gluon with other numbers of programs and stages."""
    num_sms = card_of(launch.reads[0].device).num_sms
    hopper_attention.run_decode(launch, cut.programs_per_sm * num_sms, cut)


def measure(case: Case, op: Operation, kernel: Kernel, name: str, device: torch.device, copied: float) -> Point:
    """Time a kernel and print its row."""
    shape = batch_of(case.requests, case.is_decode).shape
    num_bytes = op.memory_bytes(shape, DTYPE.itemsize)
    time_s = sustained_s(works_of(case, op, kernel, -(-MIN_DATA_BYTES // num_bytes), device))
    torch.cuda.empty_cache()
    assert isinstance(op.dims, AttentionDims)
    point = Point(
        operation=op.kind,
        shape=case.name,
        kv_type=op.dims.kv_type,
        kernel=name,
        time_us=time_s * 1e6,
        gb_per_s=num_bytes / time_s / 1e9,
        of_copy=num_bytes / time_s / 1e9 / copied,
        tflop_per_s=op.flops(shape) / time_s / 1e12,
    )
    print(f"{point.operation:<18} {point.shape:<22} {point.kv_type:<9} {name:<34}", end="")
    print(f" {point.time_us:>9.1f} {point.gb_per_s:>7.0f}", end="")
    print(f" {point.of_copy:>7.0%} {point.tflop_per_s:>8.1f}", flush=True)
    return point


def works_of(case: Case, op: Operation, kernel: Kernel, num_copies: int, device: torch.device) -> list[Work]:
    """The same launch on copies of the data."""
    dims, batch = op.dims, batch_of(case.requests, case.is_decode)
    assert isinstance(dims, AttentionDims)
    rope = RopeSpec(inv_freq=tuple(0.5**place for place in range(dims.head_dim // 2)))
    inputs = InputBuilder((rope,), num_rows=batch.num_requests, device=device).build(batch)
    slots = (int(batch.new_pages.pages.max()) + 1, dims.num_kv_heads, PAGE_SIZE)
    is_fp8, is_append = dims.kv_type is KvType.FP8, op.kind is OpKind.ROPE_APPEND

    def work() -> Work:
        keys, values = (
            torch.empty((*slots, dims.head_dim), dtype=FP8 if is_fp8 else DTYPE, device=device) for _ in range(2)
        )
        scales = torch.empty((*slots, 2), dtype=SCALE, device=device) if is_fp8 else None
        cache = LayerCache(keys=keys, values=values, scales=scales)
        draw_keys([cache], seed=0)
        width = dims.q_width + (2 * dims.kv_width if is_append else 0)
        launch = Launch(
            op=op,
            layer=0,
            tokens=TokenRange(start=0, stop=batch.num_tokens),
            reads=(torch.randn(batch.num_tokens, width, dtype=DTYPE, device=device),),
            writes=(torch.empty(batch.num_tokens, dims.q_width, dtype=DTYPE, device=device),),
            weights=(),
            inputs=inputs,
            cache=cache,
            rotation=inputs.rotations[0],
        )
        return lambda: kernel(launch)

    return [work() for _ in range(num_copies)]


if __name__ == "__main__":
    sys.exit(main())
