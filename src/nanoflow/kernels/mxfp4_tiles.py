"""Tile sizes of the products of experts in MXFP4, by the rows that an expert has on average. Data and arithmetic.

With up to about 50 rows an expert the time is that of reading its weights. Unpacking takes more than half of the
instructions that a multiprocessor issues meanwhile, so several programs share one: while one waits for a tile, another
unpacks. With more rows the products of warpgroups take longest, which compute all rows of a tile, also those that an
expert does not have. The largest tile unpacks each weight for twice as many rows, but leaves room for one program.
`benchmarks/kernels/mxfp4_experts.py` measures other tilings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        programs_per_sm: Programs that share a multiprocessor.
        group_m: Tiles along the rows of an expert that are processed at the same time.
        is_flat: Loads of the next tile begin before the present one is written.
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


# The fastest on an H200 at the sizes of gpt-oss-20b when products of a step still ran while the next one was unpacked,
# which gave wrong sums. Since steps wait for their products nothing was measured. All are tested on the card.
WHOLE_CARD = (
    Mxfp4Tiles(max_rows=12, block_m=16, num_stages=5, programs_per_sm=3),
    Mxfp4Tiles(max_rows=24, block_m=32, num_stages=4, programs_per_sm=3),
    Mxfp4Tiles(max_rows=100, block_m=64, num_stages=4, programs_per_sm=2),
    Mxfp4Tiles(max_rows=inf, block_m=128, block_k=64, num_stages=4, programs_per_sm=2, is_flat=True),
)
# Beside one program of decode attention on every multiprocessor, which leaves 47,104 of its 65,536 registers.
BESIDE = tuple(
    replace(tiles, max_rows=max_rows, programs_per_sm=1)
    for tiles, max_rows in zip(WHOLE_CARD, (12, 24, 100, inf), strict=True)
)
# For cards with less shared memory.
ANYWHERE = Mxfp4Tiles(max_rows=inf, block_m=64, block_k=64, num_stages=3, programs_per_sm=1)


def choose_mxfp4_tiles(candidates: Sequence[Mxfp4Tiles], rows_per_expert: float, limit_bytes: int) -> Mxfp4Tiles:
    """The first candidate for so many rows, or `ANYWHERE` if it does not fit into a program's shared memory.

    Args:
        candidates: By `max_rows`, smallest first; the last one is for any number.
        rows_per_expert: T x K / E.
        limit_bytes: Shared memory available to a program.
    """
    wanted = next(tiles for tiles in candidates if rows_per_expert <= tiles.max_rows)
    return wanted if wanted.shared_memory_bytes <= limit_bytes else ANYWHERE
