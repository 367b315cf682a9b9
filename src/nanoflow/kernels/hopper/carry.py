"""Products that carry decode attention, for a whole Hopper card: each runs a share of it in its own instruction stream.

An attention is taken, carried by several products one after the other on one stream, and finished: what is left of it
is done by the same program without a product, and what several runs did of one head of a request is merged. Products
are twins of `linear`, `linear_add` and `linear_swiglu` in `reference.py`, or of those in FP8 in `reference_fp8.py`, the
attention of `decode_attention`, rounded at the same places. Which product carries what is decided elsewhere
(`executor/carry.py`).

Shape legend: T tokens, K features in, N features out (rows of the weight), B rows that may be decodes, D head size.
"""

# mypy: allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoflow.graph.operation import FP8_LINEARS, AttentionDims, LinearDims, Operation, OpKind
from nanoflow.kernels import triton_fp8, triton_gemm
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.hopper.attention import boxes, check
from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS
from nanoflow.kernels.hopper.carry_attention import PARTS
from nanoflow.kernels.hopper.carry_product import ADD, GROUP_M, PLAIN, ROWS, STEP_BYTES, SWIGLU
from nanoflow.kernels.hopper.carry_programs import Cut, carry_program
from nanoflow.kernels.hopper.merge import SCAN, run_merge
from nanoflow.kernels.launch import SHARES, Launch
from nanoflow.kernels.triton_attention import LOG2_E

# Tiles of a product, with k-steps of factors of 16 bits; a tile is written in quarters. Narrow tiles read more shared
# memory for each multiply-add, so they are slower (measured for qkv, o and down on one H200), but they occupy more
# programs. A k-step in FP8 has twice as many features, and takes as long.
_TILE_ROWS, _STEP_FEATURES = PARTS * ROWS, STEP_BYTES // 2
WIDE = GemmTiles(
    block_m=_TILE_ROWS,
    block_n=256,
    block_k=_STEP_FEATURES,
    num_warps=4 * PARTS,
    num_stages=3,
    store_n=64,
    group_m=GROUP_M,
)
NARROW = GemmTiles(
    block_m=_TILE_ROWS,
    block_n=128,
    block_k=_STEP_FEATURES,
    num_warps=4 * PARTS,
    num_stages=4,
    store_n=32,
    group_m=GROUP_M,
    relative_speed=0.75,
)
# Blocks of keys, and of values, in shared memory, for each warpgroup.
KV_STAGES = 1
# Registers of a thread of the second warpgroup; the first has as many: 232 + 232 + 40 is three times 168.
WORKER_REGISTERS = 232
# A block of keys is two products, one after the other, each of which runs beside a k-step.
LEAST_STEPS = 2
# Number of k-steps of a wide tile that take as long as a block of keys in each warpgroup after the last tile; it is
# bound by memory latency (one H200).
STEPS_A_BLOCK = 2.2
_KINDS = {
    OpKind.LINEAR: PLAIN,
    OpKind.LINEAR_ADD: ADD,
    OpKind.LINEAR_SWIGLU: SWIGLU,
    OpKind.LINEAR_FP8: PLAIN,
    OpKind.LINEAR_ADD_FP8: ADD,
    OpKind.LINEAR_SWIGLU_FP8: SWIGLU,
}


@dataclass(slots=True, kw_only=True)
class Taken:
    """An attention in progress.

    Attributes:
        launch: The attention.
        sums: float32 [4 P runs, MAX_GROUP, D], two entries for each of the two warpgroups of each of P programs of each
        run.
        log_sums: float32 [4 P runs, MAX_GROUP], log2 of the sums of weights that `sums` are divided by.
        begins: int32 [2 P runs], first block of keys of each warpgroup's run.
        num_runs: Launches so far.
        until: Share of the attention done so far, in units of 1 / `SHARES`.
    """

    launch: Launch
    sums: Tensor
    log_sums: Tensor
    begins: Tensor
    num_runs: int = 0
    until: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factors:
    """What a product reads and writes: `scales` are those of rows of x and of the weight, for factors in FP8."""

    x: Tensor
    weight: Tensor
    out: Tensor
    bias: Tensor | None = None
    scales: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """The arguments of `carry_program` about a product; without tiles there is none, and its factors are unused."""

    factors: _Factors
    tiles: GemmTiles
    down: int = 0
    across: int = 0
    num_steps: int = 0
    second_rows: int = 0
    kind: int = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperCarrier:
    """`executor.carry.Carrier` for a Hopper card.

    Attributes:
        num_sms: SMs of the card.
        steps: K-steps of a product in wide tiles for each block of keys; at least `LEAST_STEPS` are used.
    """

    num_sms: int
    steps: int

    def rounds(self, op: Operation, num_tokens: int) -> int:
        """Blocks of keys that a product of `num_tokens` tokens carries in each warpgroup of its busiest program."""
        dims = op.dims
        assert isinstance(dims, LinearDims)
        tiles = tiles_of(num_tokens, dims.out_features, self.num_sms)
        num_steps = -(-dims.in_features // _features_of_step(1 if op.kind in FP8_LINEARS else 2))
        return _most(tiles, num_tokens, dims.out_features, self.num_sms) * (num_steps // self._steps_in(tiles))

    def take(self, attention: Launch, max_runs: int) -> Taken:
        """Prepare an attention for at most `max_runs` runs, including `finish`; queues no work.

        Raises:
            ValueError: The tensors are not contiguous, or pages do not have 16 tokens.
        """
        (q,), (out,), cache, dims = attention.reads, attention.writes, attention.cache, attention.op.dims
        assert cache is not None and isinstance(dims, AttentionDims)
        check(q, out, cache)
        num_parts = PARTS * self.num_sms * max_runs
        return Taken(
            launch=attention,
            sums=torch.empty((2 * num_parts, MAX_GROUP, dims.head_dim), dtype=torch.float32, device=q.device),
            log_sums=torch.empty((2 * num_parts, MAX_GROUP), dtype=torch.float32, device=q.device),
            begins=torch.empty(num_parts, dtype=torch.int32, device=q.device),
        )

    def run(self, product: Launch, taken: Taken, until: int) -> None:
        """Run a product, and with it the attention from the end of the last run to `until` of `SHARES`.

        Raises:
            ValueError: The tensors do not suit TMA (see `triton_gemm.run_linear`), the rows of the output are not
                adjacent, a weight in FP8 has scales of blocks, or `until` is invalid.
        """
        factors = _factors_of(product)
        x, weight, out = factors.x, factors.weight, factors.out
        if not out.is_contiguous():
            raise ValueError(
                f"output {list(out.shape)} has rows every {out.stride(0)} elements; a carrier's must be contiguous"
            )
        kind, tiles = _KINDS[product.op.kind], tiles_of(len(x), len(weight), self.num_sms)
        carrying = _Product(
            factors=factors,
            tiles=tiles,
            down=-(-len(x) // tiles.block_m),
            across=-(-len(weight) // tiles.block_n),
            num_steps=-(-x.shape[1] // _features_of_step(x.element_size())),
            second_rows=len(weight) // 2 if kind == SWIGLU else tiles.block_n // 2,
            kind=kind,
        )
        self._launch(carrying, taken, until)

    def finish(self, taken: Taken) -> None:
        """Run the rest of the attention and merge all of it into the result."""
        launch = taken.launch
        (q,), dims = launch.reads, launch.op.dims
        assert isinstance(dims, AttentionDims)
        if taken.until < SHARES:
            rows = q.view(-1, dims.head_dim)
            nothing = _Product(factors=_Factors(x=rows, weight=rows, out=rows), tiles=WIDE)
            self._launch(nothing, taken, SHARES)
        num_parts = taken.num_runs * PARTS * self.num_sms
        run_merge(launch, taken.sums, taken.log_sums, num_parts, begins=taken.begins, scan=SCAN)

    def _launch(self, product: _Product, taken: Taken, until: int) -> None:
        """Launch one run, which begins at the end of the last run's share."""
        if not taken.until <= until <= SHARES:
            raise ValueError(f"a share of attention from {taken.until} to {until}, of {SHARES}")
        launch, factors, tiles = taken.launch, product.factors, product.tiles
        dims, cache, decodes = launch.op.dims, launch.cache, launch.inputs.decodes
        assert isinstance(dims, AttentionDims) and cache is not None
        (q,), (attended,), tables = launch.reads, launch.writes, launch.pages.decode_tables
        carry_program[(self.num_sms,)](
            *(_steps(factors.x, tiles.block_m), _steps(factors.weight, tiles.block_n // 2)),
            *(factors.bias, *factors.scales, factors.out),
            *(*factors.out.shape, product.down, product.across, product.num_steps, product.second_rows),
            # A row is one head of one token.
            boxes(q.view(-1, dims.head_dim), MAX_GROUP),
            boxes(cache.keys.view(-1, dims.head_dim), PAGE_TOKENS),
            boxes(cache.values.view(-1, dims.head_dim), PAGE_TOKENS),
            *(attended, taken.sums, taken.log_sums, taken.begins),
            *(tables, decodes.context_len, decodes.key_blocks, tables.stride(0)),
            *(launch.tokens.start, len(q), dims.scale * LOG2_E),
            *(taken.num_runs, taken.until, until),
            round(product.num_steps / _times_of_wide(tiles) / STEPS_A_BLOCK),
            CUT=Cut(
                block_n=tiles.block_n,
                steps=self._steps_in(tiles),
                stages=tiles.num_stages,
                kv_stages=KV_STAGES,
                group=dims.num_heads // dims.num_kv_heads,
                kv_heads=dims.num_kv_heads,
                head_dim=dims.head_dim,
                kind=product.kind,
                item_bytes=factors.x.element_size(),
                scan=SCAN,
                worker_registers=WORKER_REGISTERS,
            ),
            num_warps=4,
        )
        taken.num_runs, taken.until = taken.num_runs + 1, until

    def _steps_in(self, tiles: GemmTiles) -> int:
        """K-steps for each block of keys; more for narrow tiles, whose k-steps are less work."""
        return max(self.steps * _times_of_wide(tiles), LEAST_STEPS)


def tiles_of(num_tokens: int, num_columns: int, num_sms: int) -> GemmTiles:
    """Narrow tiles (half as much work each) unless some program would get more of them than of wide ones."""
    sizes = (num_tokens, num_columns, num_sms)
    return NARROW if _most(NARROW, *sizes) <= _most(WIDE, *sizes) else WIDE


def _most(tiles: GemmTiles, num_tokens: int, num_columns: int, num_sms: int) -> int:
    """Tiles of the busiest program."""
    return -(-tiles.num_tiles(num_tokens, num_columns) // num_sms)


def _times_of_wide(tiles: GemmTiles) -> int:
    """Number of k-steps that are as much work as one k-step of a wide tile."""
    return WIDE.block_n // tiles.block_n


def _features_of_step(item_bytes: int) -> int:
    """Features of a k-step, for factors of this size."""
    return STEP_BYTES // item_bytes


def _factors_of(product: Launch) -> _Factors:
    """The tensors of a product.

    Raises:
        ValueError: See `HopperCarrier.run`.
    """
    (out,) = product.writes
    if product.op.kind not in FP8_LINEARS:
        (x, *_), (weight, *biases) = product.reads, product.weights
        triton_gemm.check_operands(x, weight, out)
        return _Factors(x=x, weight=weight, out=out, bias=biases[0] if biases else None)
    (x, x_scales, *_), (weight, scales, *biases) = product.reads, product.weights
    triton_fp8.check_operands(x, weight, out)
    if scales.dim() > 1:
        raise ValueError(f"scales {list(scales.shape)} of blocks of a weight; a carrier takes one for each row")
    return _Factors(x=x, weight=weight, out=out, bias=biases[0] if biases else None, scales=(x_scales.view(-1), scales))


def _steps(cells: Tensor, num_rows: int) -> TensorDescriptor:
    """A TMA descriptor of the rows of a factor; each copy moves one k-step of `num_rows` rows."""
    item_bytes = cells.element_size()
    layout = NVMMASharedLayout(swizzle_byte_width=STEP_BYTES, element_bitwidth=8 * item_bytes, rank=2)
    return TensorDescriptor.from_tensor(cells, [num_rows, _features_of_step(item_bytes)], layout)
