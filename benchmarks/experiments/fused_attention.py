"""Experiment: four products of half a layer with decode attention inside them, one kernel a product, on a Hopper card.

Beside a product's kernel, attention's small products queue behind its large ones, and attention makes no progress. Here
the warpgroups that multiply tiles issue attention's products themselves, between their k-steps, so that both enter the
tensor pipe in program order, and keys are loaded in the shadow of the product: see `fused_attention_programs.py`. The
half layer is that of Llama-3-8B with 1,024 tokens and 340 requests of 1,280 keys; each product takes a part of the
requests in proportion to its time. First let it show in little that it is right and does not lock up, then measure:

    timeout 60 python -m benchmarks.experiments.fused_attention --check
    timeout 120 python -m benchmarks.experiments.fused_attention --json fused_attention.json

What it compiles to is seen without a card (registers are those before warps trade them: 232 to who computes):

    python -m benchmarks.experiments.fused_attention --compile

`--cuts` takes other cuts to try, BLOCK_N:STEPS:STAGES, where a block of 64 keys goes with STEPS k-steps of a tile
[128, BLOCK_N], of 64 features each, in either warpgroup. 128:8:4 halves the tile, which leaves registers and shared
memory; 256:2:3 attends twice as densely, and the ends of products are products alone.

Prediction, written before the first run, from figures of one H200 under its power limit of 700 W (a half layer):

    cuBLAS, then decode attention     1,060 us   740 to 790 mJ   measured before
    fused                               900 us   630 mJ          870 to 950 us
    fused kernel, products alone        700 us   490 mJ          cuBLAS 687 us, a Triton kernel with these tiles 693 us
    fused kernel, attention alone       450 us   310 mJ          the copy ceiling is 410 us; few blocks are in flight

- 872 to 906 us were measured for a product's kernel with the same keys streamed beside it and not looked at (random
  pages). That is the floor, since energy decides: 480 mJ of products and about 130 mJ to move 1.78 GB beside them.
- Tensor pipe: 864 k-steps of 1,024 cycles on the busiest SM, 414 blocks of 16 products m64n8k16 of 16 to 32 cycles:
  0.99 to 1.1 million cycles, 665 to 735 us at 1.49 GHz. Memory: 1.78 GB in 900 us are 2.0 TB/s, under half of what it
  can do, and a slot's keys have about three k-steps, 2 us, to arrive. So neither should bind, but power.
- Four merges of parts of heads are about 10 us of the 900.
What would refute it: from 980 us on (a gain below 1.08) issuing in order is no cure, or loads come late; products alone
beside attention alone, and 128:8:4, tell which.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.experiments.fused_attention_programs import (
    BLOCK,
    MAX_GROUP,
    PAGE_TOKENS,
    PANEL,
    PARTS,
    ROWS,
    fused_program,
)
from benchmarks.kernels_attention import Case, batch_of
from nanoflow.bench.machine import detect_machine, detect_software
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims
from nanoflow.kernels.gluon_attention import PROGRAMS_PER_SM, merge_program, run_decode
from nanoflow.kernels.launch import Launch, LayerCache
from nanoflow.kernels.triton_attention import card_of
from nanoflow.profiler.sustained import Span, Sustained, sustained

# N and F of the products of Llama-3-8B: qkv, o, gate_up, down.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 2 * PANEL
TILE_ROWS = PARTS * ROWS
SPAN = Span(settle_s=0.3, measure_s=0.8)
_SCAN = 512
_HOPPER = 9
_SM_BYTES = 227 << 10
# Registers of a thread of the second warpgroup; the first gets as many: 232 + 232 + 40 is three times 168.
_WORKER_REGISTERS = 232
_LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_LOG2_E = math.log2(math.e)
Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How the work is cut.

    Attributes:
        block_n: Columns of a tile, whose rows are 128.
        steps: K-steps to a block of keys of either warpgroup.
        num_stages: K-steps in shared memory.
        kv_stages: Blocks of keys and of values in shared memory, of either warpgroup.
    """

    block_n: int = 256
    steps: int = 4
    num_stages: int = 3
    kv_stages: int = 1

    def __post_init__(self) -> None:
        if self.block_n not in (128, 256):
            raise ValueError(f"tiles of {self.block_n} columns: take 128 or 256")
        if self.steps < 2 or self.num_stages < 2 or self.kv_stages < 1:
            raise ValueError(f"{self}: at least 2 steps, 2 stages and 1 of keys")
        if self.shared_memory_bytes > _SM_BYTES:
            raise ValueError(f"{self}: {self.shared_memory_bytes >> 10} KiB of shared memory, more than an SM has")

    @property
    def shared_memory_bytes(self) -> int:
        """What a program takes: rings, weights of keys, and room to turn a tile's rows, with barriers."""
        tiles = self.num_stages * (TILE_ROWS + self.block_n) * PANEL
        blocks = PARTS * self.kv_stages * (2 * BLOCK + MAX_GROUP) * HEAD_DIM
        weights = PARTS * MAX_GROUP * BLOCK
        return 2 * (tiles + blocks + weights) + PARTS * 2048 + 512

    @property
    def text(self) -> str:
        """As `--cuts` takes it."""
        return f"{self.block_n}:{self.steps}:{self.num_stages}:{self.kv_stages}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """out [M, N] = x [M, F] @ weight [N, F]^T, bfloat16."""

    name: str
    x: Tensor
    weight: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Room for heads that several programs share: float32 [2 P, MAX_GROUP, D], and [2 P, MAX_GROUP] log2 of sums."""

    sums: Tensor
    log_sums: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to do the half layer; the gain is over cuBLAS and then decode attention."""

    way: str
    cut: str | None
    time_us: float
    energy_mj: float | None
    power_w: float | None
    clock_mhz: float | None
    gain: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Check, or check and measure, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="small problems only: is it right, does it end")
    parser.add_argument("--compile", action="store_true", help="for Hopper, here; print what it takes, and run nothing")
    parser.add_argument("--tokens", type=int, default=1024, help="M, a multiple of 128")
    parser.add_argument("--requests", type=int, default=340)
    parser.add_argument("--keys", type=int, default=1280, help="of a request, a multiple of 64")
    parser.add_argument(
        "--cuts", nargs="+", type=parse_cut, default=[Cut()], metavar="BLOCK_N:STEPS:STAGES", help="cuts to try"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if args.compile:
        for cut in args.cuts:
            print(json.dumps(compiled(cut)))
        return 0
    if args.tokens % TILE_ROWS or args.keys % BLOCK:
        parser.error(f"--tokens must be a multiple of {TILE_ROWS} and --keys of {BLOCK}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != _HOPPER:
        parser.error("this needs a Hopper card")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    if args.check:
        for cut in args.cuts:
            check(cut, device)
        return 0
    rows = measure(args.cuts, args.tokens, args.requests, args.keys, device)
    if args.json is not None:
        document = {
            "benchmark": "fused_attention",
            "machine": dataclasses.asdict(detect_machine()),
            "software": dataclasses.asdict(detect_software()),
            "tokens": args.tokens,
            "requests": args.requests,
            "keys": args.keys,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_cut(text: str) -> Cut:
    """The cut that BLOCK_N:STEPS:STAGES or BLOCK_N:STEPS:STAGES:KV_STAGES stands for."""
    names = [field.name for field in dataclasses.fields(Cut)]
    try:
        return Cut(**dict(zip(names, (int(part) for part in text.split(":")), strict=False)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def row_shares(num_rows: int, weights: Sequence[int]) -> list[range]:
    """Rows cut into consecutive shares in proportion to weights."""
    ends = [round(num_rows * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def run_fused(
    product: Product, attention: Launch, rows: range, parts: Parts, cut: Cut, num_programs: int, *, has_product: bool
) -> None:
    """The product, if asked for, and attention of these rows of the batch, by so many programs; one stream, no waits.

    Args:
        product: Its M is a multiple of 128, N of `cut.block_n`, F of 64 times `cut.steps`.
        attention: Of the whole batch; contexts are multiples of 64.
        rows: Those that are attended to here; may be none.
        parts: For as many programs or more; what comes later on the same stream may use it again.
        cut: How both are cut.
        num_programs: One an SM.
        has_product: False leaves `product.out` alone.

    Raises:
        ValueError: Sizes that the cut does not divide.
    """
    dims, cache, decodes = attention.op.dims, attention.cache, attention.inputs.decodes
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (out,) = attention.reads, attention.writes
    (num_rows, num_columns), num_features = product.out.shape, product.x.shape[1]
    rounds, rest = divmod(num_features, PANEL * cut.steps)
    if num_rows % TILE_ROWS or num_columns % cut.block_n or rest:
        raise ValueError(f"a product {num_rows} x {num_columns} x {num_features} is not divided by {cut}")
    if cache.keys.shape[2] != PAGE_TOKENS or dims.head_dim != HEAD_DIM or out.stride(0) != q.stride(0):
        raise ValueError(f"attention with pages of {cache.keys.shape[2]} tokens and heads of {dims.head_dim}")
    group = dims.num_heads // dims.num_kv_heads
    tiles_m = num_rows // TILE_ROWS
    fused_program[(num_programs,)](
        _boxes(product.x, TILE_ROWS),
        _boxes(product.weight, cut.block_n),
        product.out,
        tiles_m * (num_columns // cut.block_n) if has_product else 0,
        tiles_m,
        rounds,
        num_columns,
        # One head of one token a row.
        _boxes(q.view(-1, HEAD_DIM), MAX_GROUP),
        _boxes(cache.keys.view(-1, HEAD_DIM), PAGE_TOKENS),
        _boxes(cache.values.view(-1, HEAD_DIM), PAGE_TOKENS),
        out,
        parts.sums,
        parts.log_sums,
        decodes.page_tables,
        decodes.context_len,
        decodes.key_blocks,
        decodes.page_tables.stride(0),
        rows.start,
        len(rows),
        dims.scale * _LOG2_E,
        BLOCK_N=cut.block_n,
        STEPS=cut.steps,
        STAGES=cut.num_stages,
        KV_STAGES=cut.kv_stages,
        GROUP=group,
        KV_HEADS=dims.num_kv_heads,
        SCAN=_SCAN,
        WORKER_REGISTERS=_WORKER_REGISTERS,
        num_warps=4,
    )
    if rows:
        # Each warpgroup is a program of attention's.
        merge_program[(PARTS * num_programs,)](
            out[rows.start :],
            parts.sums,
            parts.log_sums,
            decodes.key_blocks,
            rows.start,
            len(rows),
            GROUP=group,
            KV_HEADS=dims.num_kv_heads,
            HEAD_DIM=dims.head_dim,
            MAX_GROUP=MAX_GROUP,
            SCAN=_SCAN,
            num_warps=1,
        )


def _boxes(cells: Tensor, num_rows: int) -> TensorDescriptor:
    """Rows for TMA, which moves so many of them at once, 128 bytes of each."""
    return TensorDescriptor.from_tensor(cells, [num_rows, PANEL], _LAYOUT)


def make_product(name: str, num_rows: int, num_columns: int, num_features: int, device: torch.device) -> Product:
    """Random factors, of a size that keeps results near 1, and a result that is not written yet."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    return Product(
        name=name,
        x=random(num_rows, num_features),
        weight=random(num_columns, num_features) * num_features**-0.5,
        out=torch.full((num_rows, num_columns), math.nan, dtype=torch.bfloat16, device=device),
    )


def make_attention(contexts: Sequence[int], device: torch.device) -> Launch:
    """Decode attention of requests with so many keys each, at random pages, and a result that is not written yet."""
    case = Case(
        name="fused",
        requests=tuple((context - 1, 1) for context in contexts),
        heads=(HEADS, KV_HEADS, HEAD_DIM),
        is_decode=True,
    )
    batch = batch_of(case.requests, is_decode=True)
    inputs = InputBuilder(RopeSpec(inv_freq=(1.0,)), num_rows=batch.num_requests, device=device).build(batch)
    shape = (int(batch.page_tables.max()) + 1, KV_HEADS, PAGE_TOKENS, HEAD_DIM)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn((len(contexts), HEADS * HEAD_DIM), dtype=torch.bfloat16, device=device)
    return Launch(
        op=case.operation,
        layer=0,
        tokens=TokenRange(start=0, stop=len(contexts)),
        reads=(q,),
        writes=(torch.full_like(q, math.nan),),
        weights=(),
        inputs=inputs,
        cache=LayerCache(keys=keys, values=values),
    )


def make_parts(num_programs: int, device: torch.device) -> Parts:
    """Two places for either warpgroup of each program."""
    places = 2 * PARTS * num_programs
    return Parts(
        sums=torch.empty((places, MAX_GROUP, HEAD_DIM), dtype=torch.float32, device=device),
        log_sums=torch.empty((places, MAX_GROUP), dtype=torch.float32, device=device),
    )


def product_error(product: Product) -> float:
    """Distance from torch's product in float32, relative to its length; NaN if anything is unwritten."""
    wanted = product.x.float() @ product.weight.float().T
    return float((product.out.float() - wanted).norm() / wanted.norm())


def attention_error(attention: Launch, rows: Sequence[int]) -> float:
    """The largest distance of a row from torch's attention in float32, relative to its length; NaN if unwritten."""
    decodes, cache = attention.inputs.decodes, attention.cache
    assert cache is not None
    errors = [0.0]
    for row in rows:
        context = int(decodes.context_len[row])
        pages = decodes.page_tables[row, : context // PAGE_TOKENS].long()
        keys, values = (
            cells[pages].transpose(0, 1).reshape(KV_HEADS, context, HEAD_DIM).float()
            for cells in (cache.keys, cache.values)
        )
        queries = attention.reads[0][row].view(KV_HEADS, -1, HEAD_DIM).float()
        weights = (queries @ keys.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
        wanted = (weights @ values).view(-1)
        errors.append(float((attention.writes[0][row].float() - wanted).norm() / wanted.norm()))
    # `max` drops NaN.
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def compiled(cut: Cut) -> dict[str, str | int]:
    """What the program takes on Hopper, and how often it waits for products with one, and with none, under way.

    Waits for all stand where nothing is to be under way: in either warpgroup one at the end of a tile, and two where
    keys are left after the last tile. All others leave a k-step under way.
    """
    boxes = {"x": TILE_ROWS, "weight": cut.block_n, "q": MAX_GROUP, "keys": PAGE_TOKENS, "values": PAGE_TOKENS}
    pointers = {
        **dict.fromkeys(("out", "attended"), "*bf16"),
        **dict.fromkeys(("parts", "log_sums"), "*fp32"),
        **dict.fromkeys(("page_tables", "context_len", "key_blocks"), "*i32"),
    }
    constants = {
        "BLOCK_N": cut.block_n,
        "STEPS": cut.steps,
        "STAGES": cut.num_stages,
        "KV_STAGES": cut.kv_stages,
        "GROUP": HEADS // KV_HEADS,
        "KV_HEADS": KV_HEADS,
        "SCAN": _SCAN,
        "WORKER_REGISTERS": _WORKER_REGISTERS,
    }
    kinds = {
        **{name: f"tensordesc<bf16[{rows}, {PANEL}],{_LAYOUT!r}>" for name, rows in boxes.items()},
        **pointers,
        **dict.fromkeys(constants, "constexpr"),
        "log2_scale": "fp32",
    }
    signature = {name: kinds.get(name, "i32") for name in fused_program.arg_names}
    is_aligned = {"out", "attended", "parts", "log_sums", "num_columns"}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name in is_aligned}
    source = GluonASTSource(fused_program, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(done.asm["cubin"])
        usage, code = (
            subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return {
        "cut": cut.text,
        "shared_bytes": done.metadata.shared,
        "registers": next(int(word.removeprefix("REG:")) for word in usage.split() if word.startswith("REG:")),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "products_of_tiles": code.count(f"HGMMA.64x{cut.block_n}x16"),
        "products_of_attention": code.count("HGMMA.64x8x16"),
        "waits_for_all_but_one": code.count("WARPGROUP.DEPBAR.LE gsb0, 0x1"),
        "waits_for_all": code.count("WARPGROUP.DEPBAR.LE gsb0, 0x0"),
    }


def check(cut: Cut, device: torch.device) -> None:
    """Small problems, the simplest first; each is announced before it runs, so that one that locks up is known.

    Raises:
        RuntimeError: A wrong result.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    long = [BLOCK * blocks for blocks in (20, 1, 7, 33, 2, 20, 11, 64)]
    problems: list[tuple[str, int, tuple[int, int], list[int], bool, bool]] = [
        ("product alone", 1, (128, 2), [BLOCK], True, False),
        ("product alone, several tiles a program", 2, (256, 3), [BLOCK], True, False),
        ("attention alone, one block a head", 1, (128, 1), [BLOCK], False, True),
        ("attention alone", 2, (128, 1), [BLOCK, 5 * BLOCK, 3 * BLOCK], False, True),
        ("both, a tile a program", 2, (128, 2), [BLOCK, 5 * BLOCK, 3 * BLOCK], True, True),
        ("both, more tiles than blocks", 2, (256, 4), [BLOCK, 2 * BLOCK], True, True),
        ("both, more blocks than tiles", 2, (128, 1), long, True, True),
        ("both, on the card", card_of(device).num_sms, (1024, 40), long * 12, True, True),
    ]
    for name, num_programs, (num_rows, tiles_n), contexts, has_product, has_attention in problems:
        num_features = PANEL * cut.steps * 5
        product = make_product(name, num_rows, tiles_n * cut.block_n, num_features, device)
        attention, parts = make_attention(contexts, device), make_parts(num_programs, device)
        print(f"{cut.text} {name} ... ", end="", flush=True)
        rows = range(len(contexts)) if has_attention else range(0)
        # A second time over the first one's result: nothing may be left from before.
        for _ in range(2):
            run_fused(product, attention, rows, parts, cut, num_programs, has_product=has_product)
            torch.cuda.synchronize()
        errors = (
            product_error(product) if has_product else 0.0,
            attention_error(attention, rows),
        )
        print(f"product {errors[0]:.5f}, attention {errors[1]:.5f}", flush=True)
        if not all(error < 0.01 for error in errors):
            raise RuntimeError(f"{name}: relative errors {errors}, at most 0.01 expected of bfloat16")


def measure(cuts: Sequence[Cut], num_tokens: int, num_requests: int, context: int, device: torch.device) -> list[Row]:
    """All ways to do the half layer, checked and sustained."""
    num_sms = card_of(device).num_sms
    products = [make_product(name, num_tokens, *shape, device) for name, shape in SHAPES.items()]
    attention, parts = make_attention([context] * num_requests, device), make_parts(num_sms, device)

    def multiply() -> None:
        for product in products:
            torch.mm(product.x, product.weight.T, out=product.out)

    def attend() -> None:
        run_decode(attention, PROGRAMS_PER_SM * num_sms)

    def one_after_the_other() -> None:
        multiply()
        attend()

    print(f"{num_tokens} tokens, {num_requests} requests of {context} keys")
    base = sustained(one_after_the_other, device, SPAN)
    rows = [report("cuBLAS, then decode attention", None, base, base)]
    rows.append(report("cuBLAS alone", None, sustained(multiply, device, SPAN)))
    rows.append(report("decode attention alone", None, sustained(attend, device, SPAN)))
    for cut in cuts:
        # The busiest program's k-steps are a product's time.
        steps = [
            math.ceil(num_tokens // TILE_ROWS * (product.weight.shape[0] // cut.block_n) / num_sms) * product.x.shape[1]
            for product in products
        ]
        shares = row_shares(num_requests, steps)
        check_whole(products, attention, shares, parts, cut, num_sms)
        for way, has_product, has_attention in (
            ("fused", True, True),
            ("fused kernel, products alone", True, False),
            ("fused kernel, attention alone", False, True),
        ):
            work = fused_work(products, attention, shares, parts, cut, num_sms, has_product, has_attention)
            cost = sustained(work, device, SPAN)
            rows.append(report(way, cut, cost, base if has_product and has_attention else None))
    return rows


def fused_work(
    products: Sequence[Product],
    attention: Launch,
    shares: Sequence[range],
    parts: Parts,
    cut: Cut,
    num_programs: int,
    has_product: bool,
    has_attention: bool,
) -> Work:
    """The half layer by the fused kernel, or one side of it; attention alone is one launch."""

    def work() -> None:
        if not has_product:
            everything = range(shares[0].start, shares[-1].stop)
            run_fused(products[0], attention, everything, parts, cut, num_programs, has_product=False)
            return
        for product, rows in zip(products, shares, strict=True):
            attended = rows if has_attention else range(0)
            run_fused(product, attention, attended, parts, cut, num_programs, has_product=True)

    return work


def check_whole(
    products: Sequence[Product],
    attention: Launch,
    shares: Sequence[range],
    parts: Parts,
    cut: Cut,
    num_programs: int,
) -> None:
    """Run the half layer once and print how far it is from torch's.

    Raises:
        RuntimeError: A wrong result.
    """
    attention.writes[0].fill_(math.nan)
    for product in products:
        product.out.fill_(math.nan)
    fused_work(products, attention, shares, parts, cut, num_programs, True, True)()
    torch.cuda.synchronize()
    unwritten = int(attention.writes[0].isnan().sum())
    errors = {product.name: product_error(product) for product in products}
    sample = sorted({row for share in shares for row in share[:: max(len(share) // 4, 1)]})
    errors["attention"] = attention_error(attention, sample)
    texts = ", ".join(f"{name} {error:.5f}" for name, error in errors.items())
    print(f"{cut.text} rows {[len(share) for share in shares]}; relative errors: {texts}; unwritten {unwritten}")
    if unwritten or not all(error < 0.01 for error in errors.values()):
        raise RuntimeError("a wrong result: relative errors are at most 0.01 in bfloat16")


def report(way: str, cut: Cut | None, cost: Sustained, base: Sustained | None = None) -> Row:
    """Print a line of the table, and return what it says."""
    row = Row(
        way=way,
        cut=None if cut is None else cut.text,
        time_us=cost.time_s * 1e6,
        energy_mj=None if cost.energy_j is None else cost.energy_j * 1e3,
        power_w=None if cost.energy_j is None else cost.energy_j / cost.time_s,
        clock_mhz=cost.clock_mhz,
        gain=None if base is None else base.time_s / cost.time_s,
    )
    texts = [f"{row.way:<32}{row.cut or '':<12}{row.time_us:8.1f} us"]
    for number, unit in ((row.energy_mj, "mJ"), (row.power_w, "W"), (row.clock_mhz, "MHz")):
        texts += [] if number is None else [f"{number:6.0f} {unit}"]
    texts += [] if row.gain is None else [f"{row.gain:.3f}x"]
    print("  ".join(texts), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
