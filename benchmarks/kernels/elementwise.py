"""Row-wise kernels on a GPU: time and bandwidth of each, beside a plain copy, at the shapes of Llama-3-8B in bfloat16.

A point is a CUDA graph of launches, in turn on sets of tensors that together fill several L2 caches, replayed for at
least half a second. The host time of one launch is measured separately.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.document import write_document
from nanoflow.batch import DenseBatch, NewPages
from nanoflow.cli.options import CommandParser
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, Dims, NormDims, Operation, OpKind, Resource, RowDims
from nanoflow.kernels.launch import BatchInputs, Kernel, Launch, LayerCache
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.models.fp8 import E4M3

WIDTH, INNER, VOCAB_SIZE, PAGE_SIZE = 4096, 14336, 128256, 16
ATTENTION = AttentionDims(num_heads=32, num_kv_heads=8, head_dim=128, scale=0.1, window=None)
QK_NORM = dataclasses.replace(ATTENTION, norm_eps=1e-6)
QKV_WIDTH = ATTENTION.q_width + 2 * ATTENTION.kv_width
ROPE = RopeSpec(inv_freq=tuple(500000.0 ** (-i / 64) for i in range(64)))
DTYPE, DTYPE_BYTES = torch.bfloat16, 2
L2_CACHES = 4
Issue = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel at one size: bytes that it moves, and a function that makes a set of its tensors."""

    name: str
    num_tokens: int
    num_bytes: int
    make: Callable[[], Issue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Measured times of a case."""

    kernel: str
    num_tokens: int
    time_us: float
    bandwidth_gb_per_s: float
    host_us: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write a record if asked."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.elementwise needs an NVIDIA GPU", file=sys.stderr)
        return 1
    kernels = load_kernels(args.reference)
    cases = [case for num_tokens in args.tokens for case in make_cases(kernels, num_tokens)]
    points = []
    print(f"{'kernel':<22}{'tokens':>8}{'us':>10}{'GB/s':>10}{'of copy':>9}{'host us':>9}")
    for case in cases:
        points.append(measure(case, args.seconds))
        report(points[-1], points[0])
    if args.json:
        write_document(
            args.json,
            "kernels_elementwise",
            kernels="reference" if args.reference else "triton",
            shape="Llama-3-8B, bfloat16, tensors in turns over 4 L2 caches",
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.kernels.elementwise", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 256], help="sizes of the dense batch")
    parser.add_argument("--seconds", type=float, default=0.5, help="minimum time of a point")
    parser.add_argument("--reference", action="store_true", help="measure the reference kernels instead")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1 or args.seconds <= 0:
        parser.error("--tokens must be at least 1, --seconds above 0")
    return args


def load_kernels(is_reference: bool) -> dict[OpKind, Kernel]:
    """The Triton kernels, or their reference implementations."""
    if is_reference:
        return {**REFERENCE_KERNELS, **FP8_KERNELS}
    from nanoflow.kernels.triton_elementwise import ELEMENTWISE_KERNELS
    from nanoflow.kernels.triton_fp8_rows import FP8_ROW_KERNELS

    return {**ELEMENTWISE_KERNELS, **FP8_ROW_KERNELS}


def make_cases(kernels: dict[OpKind, Kernel], num_tokens: int) -> list[Case]:
    """A copy of rows, then every kernel, with the bytes that it must read and write."""
    table = rows(VOCAB_SIZE, WIDTH)

    def copy() -> Issue:
        source, target = rows(num_tokens, 4 * WIDTH), rows(num_tokens, 4 * WIDTH)

        def issue() -> None:
            target.copy_(source)

        return issue

    def kernel(kind: OpKind, dims: Dims, read: Sequence[int], written: Sequence[int], *weights: Tensor) -> Issue:
        inputs = index_tensors(num_tokens)
        launch = Launch(
            op=Operation(name=kind, kind=kind, resource=Resource.MEMORY, reads=(), writes=(), dims=dims),
            layer=0,
            tokens=TokenRange(start=0, stop=num_tokens),
            reads=tuple(rows(num_tokens, width) for width in read),
            writes=tuple(rows(num_tokens, width) for width in written) or rows_fp8(num_tokens, dims),
            weights=weights,
            inputs=inputs,
            cache=new_cache(num_tokens) if kind is OpKind.ROPE_APPEND else None,
            rotation=inputs.rotations[0],
        )
        return lambda: kernels[kind](launch)

    def norm(kind: OpKind, *written: int) -> Issue:
        return kernel(kind, NormDims(width=WIDTH, eps=1e-5), (WIDTH,), written, rows(WIDTH))

    def rope(dims: AttentionDims) -> Issue:
        weights = (rows(dims.head_dim), rows(dims.head_dim)) if dims.norm_eps else ()
        return kernel(OpKind.ROPE_APPEND, dims, (QKV_WIDTH,), (dims.q_width,), *weights)

    row_bytes = num_tokens * WIDTH * DTYPE_BYTES
    rope_bytes = num_tokens * (2 * QKV_WIDTH * DTYPE_BYTES + 4 * ATTENTION.head_dim + 8)

    def fp8_bytes(num_read: int, width: int) -> int:
        return num_tokens * (width * (num_read * DTYPE_BYTES + 1) + 4)

    row_dims, inner_dims = RowDims(width=WIDTH), RowDims(width=INNER)
    sizes: list[tuple[str, int, Callable[[], Issue]]] = [
        ("copy", 8 * row_bytes, copy),
        ("rms_norm", 2 * row_bytes, lambda: norm(OpKind.RMS_NORM, WIDTH)),
        ("rms_norm_fp8", fp8_bytes(1, WIDTH), lambda: norm(OpKind.RMS_NORM_FP8)),
        ("rope_append", rope_bytes, lambda: rope(ATTENTION)),
        ("rope_append + qk norm", rope_bytes, lambda: rope(QK_NORM)),
        (
            "swiglu",
            3 * num_tokens * INNER * DTYPE_BYTES,
            lambda: kernel(OpKind.SWIGLU, inner_dims, (2 * INNER,), (INNER,)),
        ),
        ("swiglu_fp8", fp8_bytes(2, INNER), lambda: kernel(OpKind.SWIGLU_FP8, inner_dims, (2 * INNER,), ())),
        ("quantise_fp8", fp8_bytes(1, WIDTH), lambda: kernel(OpKind.QUANTISE_FP8, row_dims, (WIDTH,), ())),
        ("quantise_fp8, inner", fp8_bytes(1, INNER), lambda: kernel(OpKind.QUANTISE_FP8, inner_dims, (INNER,), ())),
        ("embed", 2 * row_bytes, lambda: kernel(OpKind.EMBED, row_dims, (), (WIDTH,), table)),
        ("gather_rows", 2 * row_bytes, lambda: kernel(OpKind.GATHER_ROWS, row_dims, (WIDTH,), (WIDTH,))),
    ]
    return [Case(name=name, num_tokens=num_tokens, num_bytes=size, make=make) for name, size, make in sizes]


def rows(*shape: int) -> Tensor:
    """Random rows: a GPU takes more power for random numbers than for zeros."""
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def rows_fp8(num_tokens: int, dims: Dims) -> tuple[Tensor, Tensor]:
    """Rows in FP8, and a scale for each; they are written, not read."""
    assert isinstance(dims, NormDims | RowDims)
    numbers = torch.zeros((num_tokens, dims.width), dtype=torch.uint8, device="cuda").view(E4M3)
    return numbers, torch.ones((num_tokens, 1), dtype=torch.float32, device="cuda")


def new_cache(num_tokens: int) -> LayerCache:
    """Keys and values, with a slot for every token."""
    shape = (-(-num_tokens // PAGE_SIZE), ATTENTION.num_kv_heads, PAGE_SIZE, ATTENTION.head_dim)
    return LayerCache(keys=rows(*shape), values=rows(*shape))


def index_tensors(num_tokens: int) -> BatchInputs:
    """Index tensors of a batch of decodes with random positions and slots."""
    rng, rows = np.random.default_rng(), np.arange(num_tokens, dtype=np.int32)
    batch = DenseBatch(
        iteration=1,
        rows=rows,
        epochs=np.zeros(num_tokens, np.int64),
        num_decodes=num_tokens,
        query_start=np.arange(num_tokens + 1, dtype=np.int32),
        context_len=np.ones(num_tokens, np.int32),
        token_ids=rng.integers(0, VOCAB_SIZE, num_tokens, dtype=np.int32),
        is_fed_back=np.zeros(num_tokens, np.bool_),
        positions=rng.integers(0, 4096, num_tokens, dtype=np.int32),
        slots=rng.permutation(num_tokens),
        new_pages=NewPages.none(),
        table_width=1,
        sampled=rows,
    )
    return InputBuilder((ROPE,), num_rows=num_tokens, device=torch.device("cuda")).build(batch)


def measure(case: Case, seconds: float) -> Point:
    """Device time of a launch on data outside the L2 cache, under sustained load, and host time of a launch."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    num_sets = max(2, -(-L2_CACHES * l2_bytes // case.num_bytes))
    issues = [case.make() for _ in range(num_sets)]
    host_us = issue_us(issues)
    graph = torch.cuda.CUDAGraph()
    num_launches = max(num_sets, 100)
    with torch.cuda.graph(graph):
        for issue in itertools.islice(itertools.cycle(issues), num_launches):
            issue()
    once_s = replay_s(graph, 3)
    time_us = replay_s(graph, max(3, int(seconds / once_s) + 1)) / num_launches * 1e6
    return Point(
        kernel=case.name,
        num_tokens=case.num_tokens,
        time_us=time_us,
        bandwidth_gb_per_s=case.num_bytes / time_us * 1e-3,
        host_us=host_us,
    )


def issue_us(issues: list[Issue]) -> float:
    """Host time of one of the second hundred launches; the first hundred compile, and two hundred fit in the queue."""
    elapsed_s = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        for issue in itertools.islice(itertools.cycle(issues), 100):
            issue()
        elapsed_s = time.perf_counter() - start_s
    torch.cuda.synchronize()
    return elapsed_s / 100 * 1e6


def replay_s(graph: torch.cuda.CUDAGraph, num_replays: int) -> float:
    """Mean device time of a replay in seconds."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(num_replays):
        graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / num_replays * 1e-3


def report(point: Point, copy: Point) -> None:
    """One line of the table."""
    share = point.bandwidth_gb_per_s / copy.bandwidth_gb_per_s
    numbers = f"{point.num_tokens:>8}{point.time_us:>10.2f}{point.bandwidth_gb_per_s:>10.0f}"
    print(f"{point.kernel:<22}{numbers}{share:>9.0%}{point.host_us:>9.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
