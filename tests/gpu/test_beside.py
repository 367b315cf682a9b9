"""Products and decode attention that fit on an SM together: what they compute, alone and at once, and that they do."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings")

from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.streams import Carveout, LaneStream, beside_pair
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, Operation, OpKind, Resource, Scope
from nanoflow.kernels import reference
from nanoflow.kernels import triton_gemm as whole
from nanoflow.kernels.dispatch import Kernels
from nanoflow.kernels.gemm_tiles import BESIDE_TILES, GemmTiles
from nanoflow.kernels.hopper.attention import can_attend, decode_attention
from nanoflow.kernels.launch import Launch, LayerCache
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.restricted import kernels_beside
from nanoflow.kernels.triton_split_k import make_workspace, max_splits, run_linear_add_split_k, run_linear_split_k
from tests import graphs
from tests.gemm_cases import (
    assert_linear,
    assert_linear_swiglu,
    exact_linear,
    exact_linear_swiglu,
    linear_add_case,
    linear_case,
    linear_swiglu_case,
)

DIMS = AttentionDims(num_heads=32, num_kv_heads=8, head_dim=128, scale=128**-0.5, window=None)
GPU = torch.device("cuda", torch.cuda.current_device())
if not can_attend(GPU, torch.bfloat16, DIMS):
    pytest.skip("the kernels are cut for Hopper", allow_module_level=True)

pytestmark = pytest.mark.gpu
NUM_SMS = torch.cuda.get_device_properties(GPU).multi_processor_count
SHAPES = {"qkv_proj": (6144, 4096), "o_proj": (4096, 4096), "down_proj": (4096, 14336)}
GATE_UP = (28672, 4096)
KERNELS: Kernels = {**REFERENCE_KERNELS, OpKind.DECODE_ATTENTION: decode_attention}
PAGE_TOKENS = 16


def attention_case(contexts: list[int], monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Decode attention of a request with each context."""
    monkeypatch.setattr(graphs, "PAGE_SIZE", PAGE_TOKENS)
    num = len(contexts)
    batch = graphs.batch_of([(context - 1, 1) for context in contexts], num, 10, seed=1)
    inputs = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=num, device=GPU).build(batch)
    shape = (int(inputs.pages[0].decode_tables.max()) + 1, DIMS.num_kv_heads, PAGE_TOKENS, DIMS.head_dim)
    keys, values = (torch.randn(shape, device=GPU).bfloat16() for _ in range(2))
    op = Operation(
        name="attention",
        kind=OpKind.DECODE_ATTENTION,
        resource=Resource.MEMORY,
        scope=Scope.DECODE,
        reads=("q",),
        writes=("o",),
        dims=DIMS,
    )
    q = torch.randn(num, DIMS.q_width, device=GPU).bfloat16()
    return Launch(
        op=op,
        layer=0,
        tokens=TokenRange(start=0, stop=num),
        reads=(q,),
        writes=(torch.full_like(q, torch.nan),),
        weights=(),
        inputs=inputs,
        cache=LayerCache(keys=keys, values=values),
    )


def assert_attention(launch: Launch) -> None:
    """Close to the reference in float32, as far as rounding of output and weights goes."""
    assert launch.cache is not None
    (q,) = launch.reads
    exact = torch.full_like(q, torch.nan, dtype=torch.float32)
    cache = LayerCache(keys=launch.cache.keys.float(), values=launch.cache.values.float())
    reference.decode_attention(replace(launch, reads=(q.float(),), writes=(exact,), cache=cache))
    torch.testing.assert_close(launch.writes[0].float(), exact, rtol=2**-8, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_programs", [NUM_SMS, 7])
@pytest.mark.parametrize(
    "tiles", BESIDE_TILES, ids=lambda tiles: f"{tiles.block_m}x{tiles.block_n} s{tiles.num_stages}"
)
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_any_cut_and_number_of_programs(
    dtype: torch.dtype, num_programs: int, tiles: GemmTiles, num_tokens: int
) -> None:
    """K and N end within a tile; tiles of the last round whole, and split among as many programs as can be."""
    workspace = make_workspace(BESIDE_TILES, num_programs, GPU)
    for has_bias in (False, True):
        launch = linear_case(num_tokens, (2984, 1000), dtype, GPU, has_bias=has_bias)
        added, expected = linear_add_case(num_tokens, (2984, 1000), dtype, GPU, has_bias=has_bias)
        before = added.writes[0].clone()
        whole.run_linear(launch, tiles, num_programs)
        assert_linear(launch.writes[0], exact_linear(launch))
        whole.run_linear_add(added, tiles, num_programs)
        assert_linear(added.writes[0], expected)
        num_splits = max_splits(tiles.num_tiles(num_tokens, 2984), 1000, num_programs, tiles)
        if num_splits > 1:
            launch.writes[0].fill_(torch.nan)
            run_linear_split_k(launch, tiles, num_programs, workspace, num_splits)
            assert_linear(launch.writes[0], exact_linear(launch))
            added.writes[0].copy_(before)
            run_linear_add_split_k(added, tiles, num_programs, workspace, num_splits)
            assert_linear(added.writes[0], expected)
    gated = linear_swiglu_case(num_tokens, (2992, 1000), dtype, GPU)
    whole.run_linear_swiglu(gated, tiles, num_programs)
    assert_linear_swiglu(gated.writes[0], exact_linear_swiglu(gated))


@pytest.mark.parametrize("num_tokens", [1024, 1056, 300])
def test_kernels_of_a_lane(num_tokens: int) -> None:
    """One workspace serves all products of a layer, one after the other."""
    kernels = kernels_beside(KERNELS, NUM_SMS)
    for shape in SHAPES.values():
        launch = linear_case(num_tokens, shape, torch.bfloat16, GPU)
        kernels[OpKind.LINEAR](launch)
        assert_linear(launch.writes[0], exact_linear(launch))
    for name in ("o_proj", "down_proj"):
        added, expected = linear_add_case(num_tokens, SHAPES[name], torch.bfloat16, GPU)
        kernels[OpKind.LINEAR_ADD](added)
        assert_linear(added.writes[0], expected)
    gated = linear_swiglu_case(num_tokens, GATE_UP, torch.bfloat16, GPU)
    kernels[OpKind.LINEAR_SWIGLU](gated)
    assert_linear_swiglu(gated.writes[0], exact_linear_swiglu(gated))


def capture(lane: LaneStream, kernels: Kernels, launches: list[Launch]) -> torch.cuda.CUDAGraph:
    """A graph of launches on a lane, which run there before; the kernels must outlive it."""
    torch.cuda.synchronize()
    carveout, graph = Carveout(GPU), torch.cuda.CUDAGraph()
    with carveout.open():
        with torch.cuda.stream(lane.stream):
            for launch in launches:
                kernels[launch.op.kind](launch)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=lane.stream):
            for launch in launches:
                kernels[launch.op.kind](launch)
    return graph


def test_both_lanes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives what it gives alone, in every replay."""
    pair = beside_pair(GPU)
    products = [linear_case(1056, shape, torch.bfloat16, GPU) for shape in SHAPES.values()]
    attention = attention_case([1 + 37 * row % 1500 for row in range(300)], monkeypatch)
    work = (products, [attention])
    # A graph does not keep what is theirs: the workspace that products are split in.
    kernels = [kernels_beside(KERNELS, lane.num_sms) for lane in pair]
    captured = [capture(lane, own, launches) for lane, own, launches in zip(pair, kernels, work, strict=True)]
    for launch in products:
        assert_linear(launch.writes[0], exact_linear(launch))
    assert_attention(attention)
    launches = [launch for of_lane in work for launch in of_lane]
    expected = [launch.writes[0].clone() for launch in launches]
    for launch in launches:
        launch.writes[0].fill_(torch.nan)
    torch.cuda.synchronize()
    for _ in range(20):
        for lane, graph in zip(pair, captured, strict=True):
            with torch.cuda.stream(lane.stream):
                graph.replay()
    torch.cuda.synchronize()
    for launch, result in zip(launches, expected, strict=True):
        assert torch.equal(launch.writes[0], result)


def test_decode_attention_ends_while_a_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product takes about ten milliseconds and has a program on every SM from its start to its end."""
    pair, carveout = beside_pair(GPU), Carveout(GPU)
    kernels = [kernels_beside(KERNELS, lane.num_sms) for lane in pair]
    launches = (
        linear_case(16384, (8192, 32768), torch.bfloat16, GPU),
        attention_case([64] * NUM_SMS, monkeypatch),
    )
    begin, *ends = (torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
    # The first time they are compiled and loaded.
    for _ in range(2):
        torch.cuda.synchronize()
        begin.record(pair[0].stream)
        for lane, own, launch, end in zip(pair, kernels, launches, ends, strict=True):
            with carveout.open(), torch.cuda.stream(lane.stream):
                own[launch.op.kind](launch)
                end.record(lane.stream)
            # The product's programs are all there when attention is queued.
            time.sleep(1e-3)
    torch.cuda.synchronize()
    product_ms, attention_ms = (begin.elapsed_time(end) for end in ends)
    assert attention_ms < product_ms / 2, f"attention ended after {attention_ms:.2f} of {product_ms:.2f} ms"
    assert_attention(launches[1])
