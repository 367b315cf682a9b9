"""FlashInfer's paged attention on the cases of `attention.py`, to find cases where another kernel is faster.

Needs flashinfer-python, which compiles its kernels at first use. Its planning step is not timed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.document import write_document
from benchmarks.kernels.attention import CASES, MIN_DATA_BYTES, PAGE_SIZE, Case, batch_of, sustained_s
from nanoflow.batch import DenseBatch
from nanoflow.cli.options import CommandParser
from nanoflow.graph.operation import AttentionDims

WORKSPACE_BYTES = 256 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    parser = CommandParser(prog="python -m benchmarks.kernels.flashinfer", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    points: list[dict[str, Any]] = []
    for case in CASES:
        for backend in ("tensor cores", "cuda cores") if case.is_decode else ("fa3", "fa2"):
            point = measure(case, backend)
            print(" ".join(f"{key} {value}" for key, value in point.items()), flush=True)
            points.append(point)
    if args.json is not None:
        write_document(args.json, "kernels_flashinfer", points=points)
    return 0


def measure(case: Case, backend: str) -> dict[str, Any]:
    """Time of a case with a backend, or the reason why it does not run."""
    batch, op = batch_of(case.requests, case.is_decode), case.operation
    num_bytes = op.memory_bytes(batch.shape, 2)
    try:
        time_s = sustained_s([_work(case, batch, backend) for _ in range(-(-MIN_DATA_BYTES // num_bytes))])
    except Exception as error:  # FlashInfer raises what its compiler, its loader and CUDA raise.
        return {"shape": case.name, "backend": backend, "error": str(error)[:200]}
    return {
        "shape": case.name,
        "backend": backend,
        "time_us": round(time_s * 1e6, 1),
        "tb_per_s": round(num_bytes / time_s / 1e12, 2),
        "tflop_per_s": round(op.flops(batch.shape) / time_s / 1e12, 1),
    }


def _work(case: Case, batch: DenseBatch, backend: str) -> Any:
    import flashinfer

    dims = case.operation.dims
    assert isinstance(dims, AttentionDims)
    indptr, indices, last = _pages(batch)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    heads = (dims.num_heads, dims.num_kv_heads, dims.head_dim, PAGE_SIZE)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    if case.is_decode:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=backend == "tensor cores"
        )
        wrapper.plan(indptr, indices, last, *heads, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
        window = -1 if case.window is None else case.window - 1
        wrapper.plan(
            torch.from_numpy(batch.query_start), indptr, indices, last, *heads, causal=True, window_left=window, **types
        )
    shape = (int(batch.new_pages.pages.max()) + 1, dims.num_kv_heads, PAGE_SIZE, dims.head_dim)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q = torch.randn((batch.num_tokens, dims.num_heads, dims.head_dim), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    return lambda: wrapper.run(q, (keys, values), out=out)


def _pages(batch: DenseBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page tables in FlashInfer's form: starts, ids, and number of tokens in each last page."""
    counts = -(-torch.from_numpy(batch.context_len) // PAGE_SIZE)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()))
    tables = torch.from_numpy(batch.new_pages.pages).view(batch.num_requests, -1)
    ids = [table[:count] for table, count in zip(tables, counts.tolist(), strict=True)]
    last = torch.from_numpy(batch.context_len) - (counts - 1) * PAGE_SIZE
    return indptr, torch.cat(ids).cuda(), last.int()


if __name__ == "__main__":
    sys.exit(main())
