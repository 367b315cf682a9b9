"""Tile sizes of products in Triton, and the choice of tiles for a product.

Data and arithmetic; the kernels are in `triton_gemm.py` and `triton_split_k.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

_OUT_BYTES = 2
# Bytes for barriers of the stages, and for converting a bias between two layouts.
_SCRATCH_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTiles:
    """The tiling of a product.

    Attributes:
        block_m, block_n, block_k: Size of a tile in tokens and rows of the weight, and features of a step. For
            `linear_swiglu`, half of the rows are gates.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
        store_n: Columns written at once through shared memory; divides `block_n`.
        group_m: Tiles along T that are processed at the same time, so that they share weights in L2.
        is_flat: Loads of the next tile begin before the present one is written.
        max_registers: Most registers of a thread, to leave some on the SM; None leaves it to the compiler.
        relative_speed: Multiply-adds per second while all programs are busy, relative to the fastest tiling.
        item_bytes: Size of an element of both factors.
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
    item_bytes: int = 2

    def num_tiles(self, num_rows: int, num_columns: int) -> int:
        """Number of tiles of a product [num_rows, num_columns]."""
        return -(-num_rows // self.block_m) * -(-num_columns // self.block_n)

    def shared_memory_bytes(self, *, is_gated: bool) -> int:
        """Shared memory of a program: both factors of every step in flight, and the columns written at once."""
        in_flight = self.num_stages * (self.block_m + self.block_n) * self.block_k
        written = self.block_m * self.store_n // (2 if is_gated else 1)
        return in_flight * self.item_bytes + written * _OUT_BYTES + _SCRATCH_BYTES


# Fastest first. Speeds are of one H200 at its power limit, the last two's on 100 of its 132 SMs.
GEMM_TILES = (
    GemmTiles(block_m=128, block_n=256, store_n=256, num_warps=8, num_stages=3),
    GemmTiles(block_m=128, block_n=128, store_n=128, num_warps=8, num_stages=4, relative_speed=0.9),
    GemmTiles(block_m=64, block_n=128, store_n=128, num_warps=4, num_stages=6, relative_speed=0.8),
    GemmTiles(block_m=64, block_n=128, store_n=128, num_warps=4, num_stages=3, relative_speed=0.47),
)
# For a part of a card beside other work: more steps in flight, as memory latency is higher there.
PART_TILES = (
    GemmTiles(block_m=128, block_n=256, store_n=64, num_warps=8, num_stages=4),
    GemmTiles(block_m=256, block_n=128, store_n=64, num_warps=8, num_stages=4, relative_speed=0.97),
    *GEMM_TILES[1:],
)
# For a product beside one program of decode attention on every SM, which takes 67 KiB of shared memory and 18,432
# registers. Speeds are those of similar tiles above. Half as many warps limit the number of registers.
BESIDE_TILES = (
    GemmTiles(block_m=128, block_n=256, store_n=32, num_warps=8, num_stages=3, max_registers=176),
    GemmTiles(block_m=128, block_n=128, store_n=64, num_warps=8, num_stages=4, max_registers=176, relative_speed=0.9),
    GemmTiles(block_m=64, block_n=128, store_n=64, num_warps=4, num_stages=6, relative_speed=0.8),
    GEMM_TILES[-1],
)


def _of_fp8(candidates: tuple[GemmTiles, ...], *, is_blocked: bool) -> tuple[GemmTiles, ...]:
    """Tilings for factors of one byte: steps of twice as many features, which take the same memory.

    Where weights have a scale for each block of 128 x 128, a tile has the rows of one block, and two sums take twice
    the registers. Tiles that would not have enough registers are left out.
    """
    fitting = [
        tiles
        for tiles in candidates
        if ((tiles.block_n == _BLOCK and tiles.block_m <= _BLOCK) or not is_blocked)
        and (tiles.block_n <= _BLOCK or tiles.max_registers is None)
    ]
    return tuple(for_fp8(tiles, is_blocked=False) for tiles in fitting)


def for_fp8(tiles: GemmTiles, *, is_blocked: bool) -> GemmTiles:
    """A tiling for factors of one byte; with scales of blocks one that has the rows of a block at most.

    Where that makes it narrower, more steps are in flight in the same memory.
    """
    if is_blocked and tiles.block_n > _BLOCK:
        num_stages = tiles.num_stages * (tiles.block_m + tiles.block_n) // (tiles.block_m + _BLOCK)
        tiles = replace(tiles, block_n=_BLOCK, store_n=min(tiles.store_n, _BLOCK), num_stages=num_stages)
    return replace(tiles, block_k=_BLOCK, item_bytes=1)


_BLOCK = 128
# For products in FP8, with scales of rows or of blocks, by the candidates that they are made of. Not measured yet:
# speeds are those of 16 bits.
FP8_TILES: dict[tuple[tuple[GemmTiles, ...], bool], tuple[GemmTiles, ...]] = {
    (candidates, is_blocked): _of_fp8(candidates, is_blocked=is_blocked)
    for candidates in (GEMM_TILES, PART_TILES, BESIDE_TILES)
    for is_blocked in (False, True)
}


def choose_gemm_tiles(
    candidates: Sequence[GemmTiles], num_rows: int, num_columns: int, num_programs: int, limit_bytes: int
) -> GemmTiles:
    """The tiling with the least work for the busiest program, among those that fit into `limit_bytes`.

    Few tokens get small tiles, as large ones would leave programs idle. Ties go to the earlier candidate.

    Args:
        candidates: Tilings, fastest first; the last fits every device.
        num_rows, num_columns: T, and N (or 2 I).
        num_programs: Programs that share the tiles.
        limit_bytes: Shared memory available to a program.
    """

    def longest_time(tiles: GemmTiles) -> float:
        num_tiles = tiles.num_tiles(num_rows, num_columns)
        cells = -(-num_tiles // num_programs) * tiles.block_m * tiles.block_n
        return float(cells / tiles.relative_speed)

    fitting = [tiles for tiles in candidates if tiles.shared_memory_bytes(is_gated=False) <= limit_bytes]
    return min(fitting or candidates[-1:], key=longest_time)


def with_addend(tiles: GemmTiles) -> GemmTiles:
    """The tiling with smaller writes: each piece needs twice the shared memory, for the addend and for the result."""
    return replace(tiles, store_n=tiles.store_n // 2)
