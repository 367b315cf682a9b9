"""CPU kernels: float32 products by oneDNN, those of experts too. All others on a CPU are those of `reference.py`.

torch computes float32 products with MKL. For few rows, as in decode, MKL is several times slower than oneDNN on some
processors. Numbers: docs/log/2026-11-22-cpu-products.md.

oneDNN compiles code for each shape of product (about 0.75 MB) and caches the last 1,024. Batches have hundreds of
sizes, so products are padded to a few numbers of rows: see `row_blocks`. `device/host_memory.py` bounds the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import reference, reference_experts
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.kernels.reference_mxfp4 import MXFP4_KERNELS

# Larger products are split into parts of this many rows, so that the cost of reading the weights again is negligible.
MAX_ROWS = 256


def has_onednn() -> bool:
    """True if this torch was built with oneDNN's linear operation."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(launch: Launch) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T (+ bias [N])."""
    _multiply(launch, Tensor.copy_)


def linear_add(launch: Launch) -> None:
    """hidden [T, N] += x [T, K] @ weight [N, K]^T (+ bias [N])."""
    _multiply(launch, Tensor.add_)


def _multiply(launch: Launch, write: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compute a product and write it to its output, part by part."""
    (out,), (weight, *bias) = launch.writes, launch.weights
    for rows, product in _products(launch.reads[0], weight, bias):
        write(out if rows is None else out[rows], product)


@lru_cache(maxsize=4096)
def row_blocks(num_rows: int) -> tuple[tuple[slice, int], ...]:
    """The parts of `num_rows` rows, and the number of rows that each is padded to; there are 48 such numbers in all.

    Up to 16 rows nothing is padded; above, to multiples of a sixteenth of the next power of two. At 32 rows, one more
    row costs about 1.6 % of a product. So padding costs 1 % on average up to 32 rows, and 3 % above.
    """
    blocks = []
    for start in range(0, num_rows, MAX_ROWS):
        count = min(num_rows - start, MAX_ROWS)
        step = max((1 << (count - 1).bit_length()) // 16, 1)
        blocks.append((slice(start, start + count), -(-count // step) * step))
    return tuple(blocks)


def experts_in(launch: Launch) -> None:
    """As in `reference_experts.py`; the rows are sorted once, and each expert with rows takes products of its own."""
    dims = launch.op.dims
    assert isinstance(dims, ExpertDims)
    (x, rows, ends), (activation,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    out = activation.view(rows.numel(), -1)
    sorted_x = x.index_select(0, rows.flatten() // rows.shape[1])
    for expert, places in reference_experts.parts_of_experts(ends):
        for part, product in _products(sorted_x[places], weight[expert], [each[expert] for each in bias]):
            target = out[places] if part is None else out[places][part]
            reference_experts.activate(product, dims.clamped, target)


def experts_out(launch: Launch) -> None:
    """As in `reference_experts.py`."""
    (activation, rows, ends), (out,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    by_expert, by_token, order = activation.view(rows.numel(), -1), out.view(rows.numel(), -1), rows.flatten()
    for expert, places in reference_experts.parts_of_experts(ends):
        for part, product in _products(by_expert[places], weight[expert], [each[expert] for each in bias]):
            by_token.index_copy_(0, (order[places] if part is None else order[places][part]).long(), product)


def _products(x: Tensor, weight: Tensor, bias: list[Tensor]) -> Iterator[tuple[slice | None, Tensor]]:
    """Rows and their product, part by part; None stands for all rows, as a view of a tensor takes some microseconds."""
    multiply = _by_onednn if x.dtype == torch.float32 else F.linear
    blocks = row_blocks(len(x))
    if len(blocks) == 1 and blocks[0][1] == len(x):
        yield None, multiply(x, weight, bias[0] if bias else None)
        return
    for rows, padded in blocks:
        part, count = x[rows], rows.stop - rows.start
        whole = part if padded == count else F.pad(part, (0, 0, 0, padded - count))
        yield rows, multiply(whole, weight, bias[0] if bias else None)[:count]


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


_BY_ONEDNN: dict[OpKind, Kernel] = {
    OpKind.LINEAR: linear,
    OpKind.LINEAR_ADD: linear_add,
    OpKind.EXPERTS_IN: experts_in,
    OpKind.EXPERTS_OUT: experts_out,
}
CPU_KERNELS: dict[OpKind, Kernel] = {
    **reference.REFERENCE_KERNELS,
    **FP8_KERNELS,
    **MXFP4_KERNELS,
    **(_BY_ONEDNN if has_onednn() else {}),
}
