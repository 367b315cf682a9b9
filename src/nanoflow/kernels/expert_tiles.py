"""Tile sizes of the grouped products of experts, by the rows that an expert has on average.

Data and arithmetic; the kernels are in `triton_experts.py`, what a tiling is in `gemm_tiles.py`. Up to some 150 rows an
expert the time is that of reading its weights. Then one tile should hold all of its rows, since each further one loads
the weights from L2 again, and many loads must be in flight. `benchmarks/kernels/experts.py` measures other tilings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from nanoflow.kernels.gemm_tiles import GemmTiles, for_fp8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTiles:
    """The tilings of both products.

    Attributes:
        max_rows: Most rows of an expert, on average, that they are for.
        first, second: Of EXPERTS_IN, for which half of a tile's columns are gates, and of EXPERTS_OUT.
    """

    max_rows: float
    first: GemmTiles
    second: GemmTiles

    @property
    def shared_memory_bytes(self) -> int:
        """Most shared memory of a program."""
        return max(self.first.shared_memory_bytes(is_gated=True), self.second.shared_memory_bytes(is_gated=False))


def _both(max_rows: float, tiles: GemmTiles) -> ExpertTiles:
    return ExpertTiles(max_rows=max_rows, first=tiles, second=tiles)


# Less than an average leaves room for experts that have more rows than others.
_FEW_ROWS = (
    _both(8, GemmTiles(block_m=16, block_n=128, store_n=128, num_warps=4, num_stages=7)),
    _both(24, GemmTiles(block_m=32, block_n=128, store_n=64, num_warps=4, num_stages=7)),
    _both(48, GemmTiles(block_m=64, block_n=128, store_n=64, num_warps=4, num_stages=6)),
)
WHOLE_CARD = (*_FEW_ROWS, _both(inf, GemmTiles(block_m=128, block_n=256, store_n=64, num_warps=8, num_stages=4)))
# Beside one program of decode attention on every SM; see `gemm_tiles.BESIDE_TILES`.
BESIDE = (
    *_FEW_ROWS,
    _both(inf, GemmTiles(block_m=128, block_n=256, store_n=32, num_warps=8, num_stages=3, max_registers=176)),
)
# For cards with less shared memory.
ANYWHERE = _both(inf, GemmTiles(block_m=64, block_n=128, store_n=64, num_warps=4, num_stages=3))


def _of_fp8(tiles: ExpertTiles, *, is_blocked: bool) -> ExpertTiles:
    """The same for factors of one byte."""
    first, second = (for_fp8(each, is_blocked=is_blocked) for each in (tiles.first, tiles.second))
    return ExpertTiles(max_rows=tiles.max_rows, first=first, second=second)


# For products in FP8, with scales of rows or of blocks: tilings by the candidates that they are made of, and what suits
# any card. Not measured yet.
FP8_EXPERT_TILES: dict[tuple[tuple[ExpertTiles, ...], bool], tuple[tuple[ExpertTiles, ...], ExpertTiles]] = {
    (candidates, is_blocked): (
        tuple(_of_fp8(each, is_blocked=is_blocked) for each in candidates),
        _of_fp8(ANYWHERE, is_blocked=is_blocked),
    )
    for candidates in (WHOLE_CARD, BESIDE)
    for is_blocked in (False, True)
}


def choose_expert_tiles(
    candidates: Sequence[ExpertTiles], rows_per_expert: float, limit_bytes: int, anywhere: ExpertTiles = ANYWHERE
) -> ExpertTiles:
    """The first candidate for so many rows, or `anywhere` if it does not fit into a program's shared memory.

    Args:
        candidates: By `max_rows`, smallest first; the last one is for any number.
        rows_per_expert: T x K / E.
        limit_bytes: Shared memory available to a program.
        anywhere: What fits any card.
    """
    wanted = next(tiles for tiles in candidates if rows_per_expert <= tiles.max_rows)
    return wanted if wanted.shared_memory_bytes <= limit_bytes else anywhere
