"""CPU kernels where they pay: float32 products by oneDNN. Everything else is `reference.py`, which is their twin.

torch hands a float32 product to MKL, which on some processors is several times slower than oneDNN when there are few
rows, as in decode. Numbers: docs/log/2026-11-22-cpu-products.md.

oneDNN makes code for every shape that it meets, about 0.75 MB of it, and keeps the last 1,024 of them. Batches have
hundreds of sizes, so products are computed in few numbers of rows: see `row_blocks`. How much is kept at most is
`device/host_memory.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow.graph.operation import OpKind
from nanoflow.kernels import reference
from nanoflow.kernels.launch import Kernel, Launch

# A product of more rows is made in parts of so many: enough that reading the weights again costs next to nothing.
MAX_ROWS = 256


def has_onednn() -> bool:
    """True if this torch was built with oneDNN's linear operation."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(launch: Launch) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T (+ bias [N])."""
    (x,), (out,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    for rows, product in _products(x, weight, bias):
        (out if rows is None else out[rows]).copy_(product)


def linear_add(launch: Launch) -> None:
    """hidden [T, N] += x [T, K] @ weight [N, K]^T (+ bias [N])."""
    (x, _), (hidden,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    for rows, product in _products(x, weight, bias):
        (hidden if rows is None else hidden[rows]).add_(product)


@lru_cache(maxsize=4096)
def row_blocks(num_rows: int) -> tuple[tuple[slice, int], ...]:
    """Parts of so many rows, and the number of rows that each is padded to, of which there are 48 in all.

    Numbers up to 16 stay what they are; from there they are multiples of a sixteenth of the next power of two. A row
    more costs about 1.6 % of a product of 32 rows, so padding costs 1 % up to there on average, and 3 % of larger ones.
    """
    blocks = []
    for start in range(0, num_rows, MAX_ROWS):
        count = min(num_rows - start, MAX_ROWS)
        step = max((1 << (count - 1).bit_length()) // 16, 1)
        blocks.append((slice(start, start + count), -(-count // step) * step))
    return tuple(blocks)


def _products(x: Tensor, weight: Tensor, bias: list[Tensor]) -> Iterator[tuple[slice | None, Tensor]]:
    """Rows and their product, part after part; None for all rows: each view of a tensor takes some microseconds."""
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


CPU_KERNELS: dict[OpKind, Kernel] = {
    **reference.REFERENCE_KERNELS,
    **({OpKind.LINEAR: linear, OpKind.LINEAR_ADD: linear_add} if has_onednn() else {}),
}
