"""Tile sizes of the products of experts in MXFP4, by the rows that an expert has on average. Data and arithmetic.

With up to about 50 rows an expert the time is that of reading its weights. Unpacking takes more than half of the
instructions that a multiprocessor issues meanwhile, so several programs share one: while one waits for a tile, another
unpacks. With more rows the products of warpgroups take longest, and a large tile unpacks each weight for more rows.
`benchmarks/kernels/mxfp4_experts.py` measures other tilings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

_ROW_BYTES = 2
_SCRATCH_BYTES = 3072


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Tiles:
    """The tiling of both products.

    Attributes:
        max_rows: Most rows of an expert, on average, that it is for.
        block_m, block_n, block_k: Size of a tile in rows of tokens and rows of the weight, and features of a step.
        num_warps: Warps of a program; each four take 64 rows of the weight.
        num_stages: Steps in flight, and the one that is multiplied.
        programs_per_sm: Programs that share a multiprocessor, if nothing else runs on it.
        group_m: Tiles along the rows of an expert that are processed at the same time.
        is_flat: Loads of the next tile begin before the present one is written. The compiler then waits for every
            product, as the sums of a tile may be those of another.
    """

    max_rows: float
    block_m: int
    block_n: int = 128
    block_k: int = 128
    num_warps: int = 4
    num_stages: int
    programs_per_sm: int
    group_m: int = 16
    is_flat: bool = False

    @property
    def shared_memory_bytes(self) -> int:
        """Most shared memory of a program: words, scales and rows of every step, or the columns written at once."""
        weights = self.block_n * self.block_k * 17 // 32
        in_flight = self.num_stages * (weights + self.block_m * self.block_k * _ROW_BYTES)
        return max(in_flight, self.block_m * self.block_n * _ROW_BYTES) + _SCRATCH_BYTES


# Less than an average leaves room for experts that have more rows than others. Not measured yet.
WHOLE_CARD = (
    Mxfp4Tiles(max_rows=8, block_m=16, num_stages=5, programs_per_sm=3),
    Mxfp4Tiles(max_rows=24, block_m=32, num_stages=4, programs_per_sm=3),
    Mxfp4Tiles(max_rows=48, block_m=64, num_stages=4, programs_per_sm=2),
    Mxfp4Tiles(max_rows=100, block_m=128, block_k=64, num_stages=4, programs_per_sm=2),
    Mxfp4Tiles(max_rows=inf, block_m=256, block_k=64, num_warps=8, num_stages=4, programs_per_sm=1),
)


def choose_mxfp4_tiles(candidates: Sequence[Mxfp4Tiles], rows_per_expert: float) -> Mxfp4Tiles:
    """The first candidate for so many rows.

    Args:
        candidates: By `max_rows`, smallest first; the last one is for any number.
        rows_per_expert: T x K / E.
    """
    return next(tiles for tiles in candidates if rows_per_expert <= tiles.max_rows)
