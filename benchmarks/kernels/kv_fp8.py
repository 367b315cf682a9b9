"""Attention on a KV cache in 8 bits and on one in bfloat16, on this GPU: microseconds, and GB/s.

The kernel that the engine would choose for each and the Triton kernel, at several numbers of requests and contexts of
decode attention; prefill attention, and the kernel that writes the cache. Each point runs for at least half a second as
one CUDA graph, in turn on copies of the data that together are several times larger than the L2 cache. Pages have
random places. `--sweep` also measures other tile sizes of decode attention on 8 bits.
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
from nanoflow.kernels.kv_fp8 import FP8, SCALE
from nanoflow.kernels.launch import Kernel, Launch, LayerCache
from nanoflow.kernels.triton_attention import Tiles, card_of, num_splits, run_decode

DTYPE = torch.bfloat16
DECODES = tuple(
    decodes(f"{num} x {context}", num, context) for context in (1024, 4096) for num in (64, 128, 256, 512, 1024)
)
PREFILLS = (
    Case(name="4 x 512 after 1536", requests=((1536, 512),) * 4),
    Case(name="1 x 2048 after 14336", requests=((14336, 2048),)),
)
SWEPT = (decodes("256 x 1024", 256, 1024), decodes("256 x 4096", 256, 4096))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured time; `gb_per_s` counts every byte that the operation must move once."""

    operation: str
    shape: str
    kv_type: KvType
    kernel: str
    time_us: float
    gb_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    parser = CommandParser(prog="python -m benchmarks.kernels.kv_fp8", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--sweep", action="store_true", help="also measure other tile sizes on 8 bits")
    args = parser.parse_args(argv)
    print(f"{'operation':<18} {'requests':<22} {'type':<9} {'kernel':<28} {'us':>9} {'GB/s':>7}")
    points = list(measured(sweeps=args.sweep))
    if args.json is not None:
        write_document(
            args.json,
            "kernels_kv_fp8",
            page_size=PAGE_SIZE,
            dtype="bfloat16",
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def measured(*, sweeps: bool) -> Iterator[Point]:
    """Every point, printed as it is known."""
    device = torch.device("cuda", torch.cuda.current_device())
    for case in (*DECODES, *PREFILLS):
        for kv_type in KvType:
            op = typed(case.operation, kv_type)
            chosen = kernels_for(device, DTYPE, (op,))[op.kind]
            triton = triton_attention.decode_attention if case.is_decode else triton_attention.prefill_attention
            if chosen is not triton:
                yield measure(case, op, chosen, "Gluon", device)
            yield measure(case, op, triton, "Triton", device)
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
            yield measure(case, op, kernels_for(device, DTYPE, (op,))[op.kind], "Triton", device)
    for case in SWEPT if sweeps else ():
        op = typed(case.operation, KvType.FP8)
        for tiles in SWEEP:
            name = f"n {tiles.block_n}, {tiles.num_warps} warps, {tiles.num_stages} stages"
            yield measure(case, op, partial(decode_with, tiles=tiles), name, device)


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


def measure(case: Case, op: Operation, kernel: Kernel, name: str, device: torch.device) -> Point:
    """Time a kernel and print its row."""
    num_bytes = op.memory_bytes(batch_of(case.requests, case.is_decode).shape, DTYPE.itemsize)
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
    )
    print(f"{point.operation:<18} {point.shape:<22} {point.kv_type:<9} {name:<28}", end="")
    print(f" {point.time_us:>9.1f} {point.gb_per_s:>7.0f}", flush=True)
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
