"""The product in the program of `carry_programs.py`, in Gluon for Hopper: tiles, k-steps, and writing of results.

Factors have 16 bits or, with a scale for each of their rows, 8 (FP8, e4m3). A k-step is 128 bytes of each row, so it
has twice as many features in FP8. It takes the same shared memory, and the tensor cores as long.

Shape legend: M rows of the product, N columns, F features.

Gluon checks fields of an aggregate against their annotations, so these must be classes, not strings.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma
from triton.language.core import _aggregate as aggregate

from nanoflow.kernels.hopper.carry_attention import PARTS
from nanoflow.kernels.hopper.rings import Ring

# Rows of a tile for each warpgroup; rows of tiles in a group, which is gone through column by column.
ROWS, GROUP_M = 64, 16
# Bytes of a row in a k-step, which TMA swizzles.
STEP_BYTES = 128
# What is written: the product, the sum of the product and the old values, or SwiGLU of its two halves.
PLAIN, ADD, SWIGLU = 0, 1, 2
_STEP_BYTES: gl.constexpr = gl.constexpr(STEP_BYTES)
_ROWS: gl.constexpr = gl.constexpr(ROWS)
_PARTS: gl.constexpr = gl.constexpr(PARTS)
_GROUP_M: gl.constexpr = gl.constexpr(GROUP_M)
_ADD: gl.constexpr = gl.constexpr(ADD)
_SWIGLU: gl.constexpr = gl.constexpr(SWIGLU)


@aggregate
class Product:
    """A product, its tiles in shared memory, and this program's share of the tiles.

    Attributes:
        out: [M, N].
        bias: [N] or None.
        x_scales: float32 [M], factors of rows of x; None for factors of 16 bits.
        scales: float32, a factor for each row of the weight; None for factors of 16 bits.
        num_rows, num_columns: M and N.
        down, across: Number of tiles [2 ROWS, BLOCK_N] in each direction.
        num_steps: K-steps of a tile.
        program, num_programs: Tile i belongs to program i modulo their number.
        x: [STAGES, 2 ROWS, features of a k-step] in shared memory, rows for each k-step.
        weight: [STAGES, BLOCK_N, features of a k-step] in shared memory.
        ring: The ring of these slots.
        BLOCK_N: Columns of a tile.
        KIND: PLAIN, ADD or SWIGLU.
        ITEM_BYTES: Size of an element of both factors.
    """

    out: gl.tensor
    bias: gl.tensor | gl.constexpr
    x_scales: gl.tensor | gl.constexpr
    scales: gl.tensor | gl.constexpr
    num_rows: gl.tensor
    num_columns: gl.tensor
    down: gl.tensor
    across: gl.tensor | gl.constexpr
    num_steps: gl.tensor
    program: gl.tensor
    num_programs: gl.tensor
    x: gl.shared_memory_descriptor
    weight: gl.shared_memory_descriptor
    ring: Ring
    BLOCK_N: gl.constexpr
    KIND: gl.constexpr
    ITEM_BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, out, bias, x_scales, scales, num_rows, num_columns, down, across, num_steps, program, num_programs, x,
        weight, ring, BLOCK_N, KIND, ITEM_BYTES,
    ):  # fmt: skip
        self.out, self.num_rows, self.num_columns = out, num_rows, num_columns
        self.bias = gl.constexpr(None) if bias is None else bias
        self.x_scales = gl.constexpr(None) if x_scales is None else x_scales
        self.scales = gl.constexpr(None) if scales is None else scales
        # Triton makes an argument of 1 a constant.
        self.down, self.across = down, gl.constexpr(across) if isinstance(across, int) else across
        self.num_steps, self.program, self.num_programs = num_steps, program, num_programs
        self.x, self.weight, self.ring = x, weight, ring
        self.BLOCK_N, self.KIND, self.ITEM_BYTES = gl.constexpr(BLOCK_N), gl.constexpr(KIND), gl.constexpr(ITEM_BYTES)

    @gluon.jit
    def place_of(self, tile):
        """Row and column of a tile, in tiles, in an order that goes down the columns within groups of GROUP_M rows."""
        first = tile // (_GROUP_M * self.across) * _GROUP_M
        height = gl.minimum(self.down - first, _GROUP_M)
        place = tile % (_GROUP_M * self.across)
        return first + place % height, place // height

    @gluon.jit
    def issue_step(self, acc, count, PART: gl.constexpr):
        """Start a k-step of this warpgroup's rows when it is loaded; it is still running when this returns."""
        slot = count % self.ring.STAGES
        self.ring.wait(count)
        rows = self.x.index(slot).slice(PART * _ROWS, _ROWS)
        return warpgroup_mma(rows, self.weight.index(slot).permute((1, 0)), acc, is_async=True)

    @gluon.jit
    def scaled(self, cells, row, column, first):
        """Sums of FP8 [ROWS, columns] times the scales of their rows of x and of the weight.

        `first` is the row of the weight where those of the output's column 0 are: 0, or that of the first up factor.
        """
        # Cells are where products of so many columns leave them, so nothing moves.
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, cells.shape[1], 32]
        )
        cells = gl.convert_layout(cells, layout)
        rows = row + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, cells.shape[1], gl.SliceLayout(0, layout))
        cells *= gl.load(self.x_scales + rows, mask=rows < self.num_rows, other=0.0)[:, None]
        return cells * gl.load(self.scales + first + columns, mask=columns < self.num_columns, other=0.0)[None, :]

    @gluon.jit
    def write_tile(self, acc, tile, PART: gl.constexpr):
        """Write this warpgroup's rows [ROWS, BLOCK_N] in quarters, or in two quarters of gates beside their up factors.

        Few columns at once need few registers beside the sums: those of their scales and of what they are added to.
        """
        QUARTER: gl.constexpr = self.BLOCK_N // 4
        tile_m, tile_n = self.place_of(tile)
        row = tile_m * (_PARTS * _ROWS) + PART * _ROWS
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        if self.KIND == _SWIGLU:
            column = tile_n * (2 * QUARTER)
            self.write_gated(first, third, row, column)
            self.write_gated(second, fourth, row, column + QUARTER)
        else:
            column = tile_n * self.BLOCK_N
            self.write_plain(first, row, column)
            self.write_plain(second, row, column + QUARTER)
            self.write_plain(third, row, column + 2 * QUARTER)
            self.write_plain(fourth, row, column + 3 * QUARTER)

    @gluon.jit
    def write_plain(self, cells, row, column):
        """Write [ROWS, columns] from this row and column on."""
        if self.ITEM_BYTES == 1:
            cells = self.scaled(cells, row, column, 0)
        _write(self, cells, row, column)

    @gluon.jit
    def write_gated(self, gates, ups, row, column):
        """Write SwiGLU of gates and up factors [ROWS, columns], with the rounding of the separate operations."""
        if self.ITEM_BYTES == 1:
            gates = self.scaled(gates, row, column, 0)
            ups = self.scaled(ups, row, column, self.num_columns)
        dtype: gl.constexpr = self.out.dtype.element_ty
        exact = gates.to(dtype).to(gl.float32)
        activated = (exact / (1.0 + gl.exp(-exact))).to(dtype).to(gl.float32)
        _write(self, (activated * ups.to(dtype).to(gl.float32)).to(dtype), row, column)


@gluon.jit
def _halves(cells):
    """Both halves of the columns; a thread has pairs of them."""
    HALF: gl.constexpr = cells.shape[1] // 2
    return cells.reshape([_ROWS, 2, HALF]).permute((0, 2, 1)).split()


@gluon.jit
def make_tiles(dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, ITEM_BYTES: gl.constexpr):
    """Shared memory for STAGES k-steps: rows of x, and rows of the weight."""
    FEATURES: gl.constexpr = _STEP_BYTES // ITEM_BYTES
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * ITEM_BYTES, rank=2)
    x = gl.allocate_shared_memory(dtype, [STAGES, _PARTS * _ROWS, FEATURES], tile)
    return x, gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, FEATURES], tile)


@gluon.jit
def load_tiles(x, weight, product, second_rows):
    """Fill the ring of the product: `num_steps` k-steps of each of this program's tiles.

    The weight is loaded in two halves; the second starts `second_rows` rows after the first: adjacent, or the up
    factor.
    """
    HALF: gl.constexpr = product.BLOCK_N // 2
    STRIDE: gl.constexpr = HALF if product.KIND == _SWIGLU else product.BLOCK_N
    BYTES: gl.constexpr = (_PARTS * _ROWS + product.BLOCK_N) * _STEP_BYTES
    FEATURES: gl.constexpr = _STEP_BYTES // product.ITEM_BYTES
    count = product.program * 0
    for tile in range(product.program, product.down * product.across, product.num_programs):
        tile_m, tile_n = product.place_of(tile)
        row, column = tile_m * (_PARTS * _ROWS), tile_n * STRIDE
        for step in range(product.num_steps):
            slot = count % product.ring.STAGES
            bar = product.ring.expect(count, BYTES)
            tma.async_copy_global_to_shared(x, [row, step * FEATURES], bar, product.x.index(slot))
            rows = product.weight.index(slot)
            left, right = rows.slice(0, HALF), rows.slice(HALF, HALF)
            tma.async_copy_global_to_shared(weight, [column, step * FEATURES], bar, left)
            tma.async_copy_global_to_shared(weight, [column + second_rows, step * FEATURES], bar, right)
            count += 1


@gluon.jit
def _write(product, cells, row, column):
    """Write [ROWS, columns], 16 bytes per thread and 64 per row, not through shared memory; sums are rounded once."""
    WIDTH: gl.constexpr = cells.shape[1]
    wide: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]] + ([[0, 32]] if WIDTH == 64 else []),
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[_ROWS, WIDTH],
    )
    dtype: gl.constexpr = product.out.dtype.element_ty
    HAS_BIAS: gl.constexpr = product.bias is not None
    rows = row + gl.arange(0, _ROWS, gl.SliceLayout(1, wide))
    columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    places = product.out + rows[:, None] * product.num_columns + columns[None, :]
    exists = (rows < product.num_rows)[:, None] & (columns < product.num_columns)[None, :]
    if HAS_BIAS or product.KIND == _ADD:
        cells = gl.convert_layout(cells, wide)
        if HAS_BIAS:
            bias = gl.load(product.bias + columns, mask=columns < product.num_columns, other=0.0)
            cells += bias.to(gl.float32)[None, :]
        if product.KIND == _ADD:
            cells += gl.load(places, mask=exists, other=0.0).to(gl.float32)
        gl.store(places, cells.to(dtype), mask=exists)
    else:
        gl.store(places, gl.convert_layout(cells.to(dtype), wide), mask=exists)
