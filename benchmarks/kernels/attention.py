"""Attention kernels on this GPU: microseconds, and the part of the limits of memory or tensor cores that they reach.

Each point runs for at least half a second as one CUDA graph, in turn on copies of the data that together are several
times larger than the L2 cache. Pages have random places. `--sweep` also measures other tile sizes and splits at the
main sizes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.document import write_document
from nanoflow.batch import DenseBatch, NewPages
from nanoflow.cli.options import CommandParser
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, Operation, OpKind, Resource, Scope
from nanoflow.kernels.launch import Launch, LayerCache
from nanoflow.kernels.triton_attention import (
    DECODE_TILES,
    PREFILL_TILES,
    Tiles,
    card_of,
    choose_tiles,
    num_splits,
    run_decode,
    run_prefill,
)

PAGE_SIZE = 16
MIN_DURATION_S = 0.5
MIN_DATA_BYTES = 256 << 20
Heads = tuple[int, int, int]
Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests as (tokens in the cache before, tokens now); heads as (query heads, KV heads, head size)."""

    name: str
    requests: tuple[tuple[int, int], ...]
    heads: Heads = (32, 8, 128)
    window: int | None = None
    is_decode: bool = False

    @property
    def operation(self) -> Operation:
        """The operation that the case is of."""
        num_heads, num_kv_heads, head_dim = self.heads
        return Operation(
            name="attention",
            kind=OpKind.DECODE_ATTENTION if self.is_decode else OpKind.PREFILL_ATTENTION,
            resource=Resource.MEMORY if self.is_decode else Resource.COMPUTE,
            scope=Scope.DECODE if self.is_decode else Scope.PREFILL,
            reads=("q", "kv"),
            writes=("attn",),
            dims=AttentionDims(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                window=self.window,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured time. `tb_per_s` counts every byte once, `tflop_per_s` counts visible keys alone."""

    kernel: str
    shape: str
    tiles: Tiles
    splits: int | None
    time_us: float
    tb_per_s: float
    tflop_per_s: float


def decodes(name: str, num: int, context: int, *, is_ragged: bool = False, heads: Heads = (32, 8, 128)) -> Case:
    """Decodes of one context; ragged ones are spread evenly from almost 0 to twice the context."""
    lengths = np.linspace(1, 2 * context, num).astype(int) if is_ragged else np.full(num, context)
    order = np.random.default_rng(0).permutation(lengths)
    return Case(name=name, requests=tuple((int(n) - 1, 1) for n in order), heads=heads, is_decode=True)


CASES = (
    decodes("340 x 1280, 32/8 x 128", 340, 1280),
    decodes("340 x 1..2560, 32/8 x 128", 340, 1280, is_ragged=True),
    decodes("64 x 1280, 32/8 x 128", 64, 1280),
    decodes("8 x 8192, 32/8 x 128", 8, 8192),
    decodes("1 x 65536, 32/8 x 128", 1, 65536),
    decodes("340 x 1280, 32/8 x 64", 340, 1280, heads=(32, 8, 64)),
    decodes("340 x 1280, 28/4 x 128", 340, 1280, heads=(28, 4, 128)),
    decodes("85 x 1280, 32/32 x 128", 85, 1280, heads=(32, 32, 128)),
    Case(name="1 x 2048, 32/8 x 128", requests=((0, 2048),)),
    Case(name="1 x 8192, 32/8 x 128", requests=((0, 8192),)),
    Case(name="4 x 512, 32/8 x 128", requests=((0, 512),) * 4),
    Case(name="4 x 512 after 1536, 32/8 x 128", requests=((1536, 512),) * 4),
    Case(name="4 x 512 after 1536, 32/8 x 64", requests=((1536, 512),) * 4, heads=(32, 8, 64)),
    Case(name="1 x 8192, window 1024, 32/8 x 128", requests=((0, 8192),), window=1024),
)
SWEEPS = (
    (
        CASES[0],
        tuple(
            Tiles(block_m=16, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
            for block_n, num_warps, num_stages in (
                (64, 4, 2),
                (64, 4, 5),
                (64, 8, 3),
                (32, 4, 3),
                (32, 4, 5),
                (128, 8, 3),
            )
        ),
    ),
    (
        CASES[11],
        tuple(
            Tiles(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
            for block_m, block_n, num_warps, num_stages in (
                (128, 64, 8, 2),
                (128, 64, 8, 5),
                (128, 128, 8, 2),
                (128, 128, 8, 3),
                (64, 64, 4, 2),
                (64, 64, 4, 3),
                (64, 128, 4, 3),
            )
        ),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    parser = CommandParser(prog="python -m benchmarks.kernels.attention", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--sweep", action="store_true", help="also measure other cuts of the work at the main sizes")
    args = parser.parse_args(argv)
    print(f"{'kernel':<8} {'requests, heads':<34} {'m':>4} {'n':>4} {'warps':>5} {'stages':>6} {'splits':>6}", end="")
    print(f" {'us':>8} {'TB/s':>6} {'TFLOP/s':>8}")
    points = [measure(case) for case in CASES]
    if args.sweep:
        points += [measure(case, tiles) for case, cuts in SWEEPS for tiles in cuts]
    if args.json is not None:
        write_document(
            args.json,
            "kernels_attention",
            page_size=PAGE_SIZE,
            dtype="bfloat16",
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def measure(case: Case, tiles: Tiles | None = None) -> Point:
    """Time a case, with the kernel's own tile sizes and splits or with given ones, and print its row."""
    device, dims = torch.device("cuda", torch.cuda.current_device()), case.operation.dims
    assert isinstance(dims, AttentionDims)
    card, batch = card_of(device), batch_of(case.requests, case.is_decode)
    limit_bytes = card.shared_memory_bytes // (2 if case.is_decode else 1)
    tiles = tiles or choose_tiles(DECODE_TILES if case.is_decode else PREFILL_TILES, dims.head_dim, 2, limit_bytes)
    splits = None
    if case.is_decode:
        splits = num_splits(batch.num_requests, dims, batch.table_width * PAGE_SIZE, card.num_sms)
    num_bytes = case.operation.memory_bytes(batch.shape, 2)
    num_copies = -(-MIN_DATA_BYTES // num_bytes)
    works = works_of(case.operation, batch, tiles, splits, num_copies, device)
    time_s = sustained_s(works)
    point = Point(
        kernel="decode" if case.is_decode else "prefill",
        shape=case.name,
        tiles=tiles,
        splits=splits,
        time_us=time_s * 1e6,
        tb_per_s=num_bytes / time_s / 1e12,
        tflop_per_s=case.operation.flops(batch.shape) / time_s / 1e12,
    )
    print_row(point)
    return point


def print_row(point: Point) -> None:
    cut = point.tiles
    print(f"{point.kernel:<8} {point.shape:<34} {cut.block_m:>4} {cut.block_n:>4}", end="")
    print(f" {cut.num_warps:>5} {cut.num_stages:>6} {point.splits or '':>6}", end="")
    print(f" {point.time_us:>8.1f} {point.tb_per_s:>6.2f} {point.tflop_per_s:>8.1f}", flush=True)


def batch_of(requests: Sequence[tuple[int, int]], is_decode: bool) -> DenseBatch:
    """A batch of requests (tokens before, tokens now), each with its own pages at random places."""
    before, taken = np.array(requests).T
    num_pages = -(-(before + taken) // PAGE_SIZE)
    positions = np.concatenate([np.arange(first, first + count) for first, count in requests])
    ids = np.random.default_rng(0).permutation(int(num_pages.sum()))
    tables = np.zeros((len(requests), int(num_pages.max())), np.int32)
    tables[np.arange(tables.shape[1]) < num_pages[:, None]] = ids
    request_of_token = np.repeat(np.arange(len(requests)), taken)
    slots = tables[request_of_token, positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE
    return DenseBatch(
        iteration=1,
        rows=np.arange(len(requests), dtype=np.int32),
        epochs=np.zeros(len(requests), np.int64),
        num_decodes=len(requests) if is_decode else 0,
        query_start=np.concatenate(([0], np.cumsum(taken))).astype(np.int32),
        context_len=(before + taken).astype(np.int32),
        token_ids=np.zeros(len(positions), np.int32),
        is_fed_back=np.zeros(len(positions), np.bool_),
        positions=positions.astype(np.int32),
        slots=slots,
        new_pages=NewPages.of_tables(tables),
        table_width=tables.shape[1],
        sampled=np.arange(len(requests), dtype=np.int32),
    )


def works_of(
    op: Operation, batch: DenseBatch, tiles: Tiles, splits: int | None, num_copies: int, device: torch.device
) -> list[Work]:
    """The same launch on copies of the data."""
    dims = op.dims
    assert isinstance(dims, AttentionDims)
    num_pages = int(batch.new_pages.pages.max()) + 1
    inputs = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=batch.num_requests, device=device).build(batch)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    def work() -> Work:
        shape = (num_pages, dims.num_kv_heads, PAGE_SIZE, dims.head_dim)
        q = random(batch.num_tokens, dims.q_width)
        launch = Launch(
            op=op,
            layer=0,
            tokens=TokenRange(start=0, stop=batch.num_tokens),
            reads=(q,),
            writes=(torch.empty_like(q),),
            weights=(),
            inputs=inputs,
            cache=LayerCache(keys=random(*shape), values=random(*shape)),
        )
        return lambda: run_prefill(launch, tiles) if splits is None else run_decode(launch, tiles, splits)

    return [work() for _ in range(num_copies)]


def sustained_s(works: Sequence[Work]) -> float:
    """Seconds of one launch, from replays of a CUDA graph of all launches for at least `MIN_DURATION_S`."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    num_replays = max(3, int(1.2 * MIN_DURATION_S / elapsed_s(graph, 3)))
    return elapsed_s(graph, num_replays) / len(works)


def elapsed_s(graph: torch.cuda.CUDAGraph, num_replays: int) -> float:
    """Seconds of one replay."""
    start, stop = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
    start.record()
    for _ in range(num_replays):
        graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / num_replays


if __name__ == "__main__":
    sys.exit(main())
