"""How products in Triton are cut: the sizes of tiles there are, and which of them suits a product.

Data and arithmetic; the kernels are `triton_gemm.py`'s and `triton_split_k.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

_ITEM_BYTES = 2
# Barriers of the steps in flight, and a bias between two layouts.
_SCRATCH_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTiles:
    """How a product is cut.

    Attributes:
        block_m, block_n, block_k: Tokens, rows of the weight and features a step. Of `linear_swiglu`, half of the rows
            are gates.
        num_warps: Warps a program.
        num_stages: Steps in flight.
        store_n: Columns that are written at once, through shared memory; it divides `block_n`.
        group_m: Tiles along T whose programs run beside each other, so that they find their weights in L2.
        is_flat: Loads of the next tile begin before the last one is written.
        max_registers: Of a thread, so that others find some on the SM; None leaves it to the compiler.
        relative_speed: Multiply-adds a second, of the fastest cut's, while all programs are busy.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    store_n: int
    block_k: int = 64
    group_m: int = 16
    is_flat: bool = True
    max_registers: int | None = None
    relative_speed: float = 1.0

    def num_tiles(self, num_rows: int, num_columns: int) -> int:
        """Of a product [num_rows, num_columns]."""
        return -(-num_rows // self.block_m) * -(-num_columns // self.block_n)

    def shared_memory_bytes(self, *, is_gated: bool) -> int:
        """What a program takes: both factors of every step in flight, and what is written at once."""
        in_flight = self.num_stages * (self.block_m + self.block_n) * self.block_k
        written = self.block_m * self.store_n // (2 if is_gated else 1)
        return (in_flight + written) * _ITEM_BYTES + _SCRATCH_BYTES


# Fastest first. Speeds are those of one H200 under its power limit, the last two's on 100 of its 132 SMs.
GEMM_TILES = (
    GemmTiles(block_m=128, block_n=256, store_n=256, num_warps=8, num_stages=3),
    GemmTiles(block_m=128, block_n=128, store_n=128, num_warps=8, num_stages=4, relative_speed=0.9),
    GemmTiles(block_m=64, block_n=128, store_n=128, num_warps=4, num_stages=6, relative_speed=0.8),
    GemmTiles(block_m=64, block_n=128, store_n=128, num_warps=4, num_stages=3, relative_speed=0.47),
)
# Beside others, on a part of a card: more steps in flight, as memory is slow to answer there.
PART_TILES = (
    GemmTiles(block_m=128, block_n=256, store_n=64, num_warps=8, num_stages=4),
    GemmTiles(block_m=256, block_n=128, store_n=64, num_warps=8, num_stages=4, relative_speed=0.97),
    *GEMM_TILES[1:],
)
# Beside one program of decode attention on every SM, which takes 67 KiB of shared memory and 18,432 registers. Speeds
# are those of like tiles above. Half the warps cannot take too many registers.
BESIDE_TILES = (
    GemmTiles(block_m=128, block_n=256, store_n=32, num_warps=8, num_stages=3, max_registers=176),
    GemmTiles(block_m=128, block_n=128, store_n=64, num_warps=8, num_stages=4, max_registers=176, relative_speed=0.9),
    GemmTiles(block_m=64, block_n=128, store_n=64, num_warps=4, num_stages=6, relative_speed=0.8),
    GEMM_TILES[-1],
)


def choose_gemm_tiles(
    candidates: Sequence[GemmTiles], num_rows: int, num_columns: int, num_programs: int, limit_bytes: int
) -> GemmTiles:
    """The candidate by which the busiest program is done first, of those that fit into `limit_bytes`.

    Few tokens get small tiles, as large ones would leave programs without work; ties go to the earlier candidate.

    Args:
        candidates: Cuts, fastest first; the last fits everywhere.
        num_rows, num_columns: T, and N (or 2 I).
        num_programs: Programs that share the tiles.
        limit_bytes: Shared memory of a program.
    """

    def longest_time(tiles: GemmTiles) -> float:
        num_tiles = tiles.num_tiles(num_rows, num_columns)
        cells = -(-num_tiles // num_programs) * tiles.block_m * tiles.block_n
        return float(cells / tiles.relative_speed)

    fitting = [tiles for tiles in candidates if tiles.shared_memory_bytes(is_gated=False) <= limit_bytes]
    return min(fitting or candidates[-1:], key=longest_time)


def with_addend(tiles: GemmTiles) -> GemmTiles:
    """The cut that writes smaller pieces, as each takes twice the shared memory: to be added, and to be written."""
    return replace(tiles, store_n=tiles.store_n // 2)
