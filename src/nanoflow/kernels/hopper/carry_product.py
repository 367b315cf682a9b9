"""The product in the program of `carry_programs.py`, in Gluon for Hopper: its tiles, its k-steps, its results.

Shape legend: M rows of the product, N columns, F features.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from nanoflow.kernels.hopper.attention_programs import PANEL
from nanoflow.kernels.hopper.carry_attention import PARTS

# Rows of a tile that one warpgroup has; rows of tiles that are gone down together.
ROWS, GROUP_M = 64, 16
# What is written of a product: itself, it added to what is there, SwiGLU of its halves.
PLAIN, ADD, SWIGLU = 0, 1, 2
_PANEL: gl.constexpr = gl.constexpr(PANEL)
_ROWS: gl.constexpr = gl.constexpr(ROWS)
_PARTS: gl.constexpr = gl.constexpr(PARTS)
_GROUP_M: gl.constexpr = gl.constexpr(GROUP_M)
_ADD: gl.constexpr = gl.constexpr(ADD)
_SWIGLU: gl.constexpr = gl.constexpr(SWIGLU)


@gluon.jit
def place_of(tile, tiles_m, tiles_n):
    """Row and column of a tile, in tiles: down the columns of one group of rows of tiles after the other."""
    first = tile // (_GROUP_M * tiles_n) * _GROUP_M
    height = gl.minimum(tiles_m - first, _GROUP_M)
    place = tile % (_GROUP_M * tiles_n)
    return first + place % height, place // height


@gluon.jit
def load_tiles(
    x, weight, x_ring, weight_ring, full, empty, program, num_programs, tiles_m, tiles_n, num_steps, second_rows,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Fill the ring of the product: `num_steps` k-steps of each of this program's tiles.

    Weights come in halves of a tile, the second one `second_rows` after the first: next to it, or of the other factor.
    """
    HALF: gl.constexpr = BLOCK_N // 2
    STRIDE: gl.constexpr = HALF if KIND == _SWIGLU else BLOCK_N
    count = program * 0
    for tile in range(program, tiles_m * tiles_n, num_programs):
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n)
        row, column = tile_m * (_PARTS * _ROWS), tile_n * STRIDE
        for step in range(num_steps):
            slot = count % STAGES
            mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, (_PARTS * _ROWS + BLOCK_N) * _PANEL * 2)
            tma.async_copy_global_to_shared(x, [row, step * _PANEL], bar, x_ring.index(slot))
            left, right = weight_ring.index(slot).slice(0, HALF), weight_ring.index(slot).slice(HALF, HALF)
            tma.async_copy_global_to_shared(weight, [column, step * _PANEL], bar, left)
            tma.async_copy_global_to_shared(weight, [column + second_rows, step * _PANEL], bar, right)
            count += 1


@gluon.jit
def issue_step(acc, count, x_ring, weight_ring, full, PART: gl.constexpr, STAGES: gl.constexpr):
    """A k-step of this warpgroup's rows, once it is there; it is under way when this returns."""
    slot = count % STAGES
    mbarrier.wait(full.index(slot), (count // STAGES) & 1)
    rows = x_ring.index(slot).slice(PART * _ROWS, _ROWS)
    return warpgroup_mma(rows, weight_ring.index(slot).permute((1, 0)), acc, is_async=True)


@gluon.jit
def write_tile(
    out, bias, acc, tile_row, tile_n, num_rows, num_columns,
    BLOCK_N: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Rows [ROWS, BLOCK_N] of a tile from registers, in halves, each of which a thread has both columns of."""
    HALF: gl.constexpr = BLOCK_N // 2
    left, right = acc.reshape([_ROWS, 2, HALF]).permute((0, 2, 1)).split()
    if KIND == _SWIGLU:
        dtype: gl.constexpr = out.dtype.element_ty
        # Rounded wherever the separate operations would write to memory or round.
        exact = left.to(dtype).to(gl.float32)
        activated = (exact / (1.0 + gl.exp(-exact))).to(dtype).to(gl.float32)
        product = (activated * right.to(dtype).to(gl.float32)).to(dtype)
        _write_half(out, bias, product, tile_row, tile_n * HALF, num_rows, num_columns, HALF, KIND, HAS_BIAS)
    else:
        column = tile_n * BLOCK_N
        _write_half(out, bias, left, tile_row, column, num_rows, num_columns, HALF, KIND, HAS_BIAS)
        _write_half(out, bias, right, tile_row, column + HALF, num_rows, num_columns, HALF, KIND, HAS_BIAS)


@gluon.jit
def _write_half(
    out, bias, cells, row, column, num_rows, num_columns,
    WIDTH: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Cells [ROWS, WIDTH], 16 bytes a thread and 64 a row, without shared memory; added in float32, rounded once."""
    wide: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]] + ([[0, 64]] if WIDTH == 128 else []),
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[_ROWS, WIDTH],
    )
    dtype: gl.constexpr = out.dtype.element_ty
    rows = row + gl.arange(0, _ROWS, gl.SliceLayout(1, wide))
    columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    places = out + rows[:, None] * num_columns + columns[None, :]
    exists = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if HAS_BIAS or KIND == _ADD:
        cells = gl.convert_layout(cells, wide)
        if HAS_BIAS:
            cells += gl.load(bias + columns, mask=columns < num_columns, other=0.0).to(gl.float32)[None, :]
        if KIND == _ADD:
            cells += gl.load(places, mask=exists, other=0.0).to(gl.float32)
        gl.store(places, cells.to(dtype), mask=exists)
    else:
        gl.store(places, gl.convert_layout(cells.to(dtype), wide), mask=exists)
