"""Products whose last round is split, on a GPU at the sizes of Llama-3-8B, against the same numbers in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.executor.streams import partition_pair
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_gemm as whole
from nanoflow.kernels.dispatch import Kernels
from nanoflow.kernels.gemm_tiles import PART_TILES, GemmTiles
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.restricted import kernels_on
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_split_k import (
    SplitWorkspace,
    choose_split_cut,
    make_workspace,
    max_splits,
    run_linear_add_split_k,
    run_linear_split_k,
)
from tests.gemm_cases import (
    assert_linear,
    assert_linear_swiglu,
    assert_surroundings_untouched,
    exact_linear,
    exact_linear_swiglu,
    linear_add_case,
    linear_case,
    linear_swiglu_case,
)

GPU = torch.device("cuda", torch.cuda.current_device())
if not whole.has_tma(GPU):
    pytest.skip("needs a GPU with a tensor memory accelerator", allow_module_level=True)

pytestmark = pytest.mark.gpu
SHAPES = {"qkv_proj": (6144, 4096), "o_proj": (4096, 4096), "down_proj": (4096, 14336)}
GATE_UP = (28672, 4096)
ADDED_SHAPES = {name: SHAPES[name] for name in ("o_proj", "down_proj")}
NUM_TOKENS = pytest.mark.parametrize("num_tokens", [1024, 1056, 300])
NUM_PROGRAMS = pytest.mark.parametrize("num_programs", [132, 100, 68])
TILES = pytest.mark.parametrize("tiles", PART_TILES[:3], ids=lambda tiles: f"{tiles.block_m}x{tiles.block_n}")
NUM_REPLAYS = 3


def poisoned(num_programs: int) -> SplitWorkspace:
    workspace = make_workspace(PART_TILES, num_programs, GPU)
    workspace.sums.fill_(torch.nan)
    return workspace


def splits(launch: Launch, num_programs: int, tiles: GemmTiles) -> set[int]:
    """Two, and as many as there can be; none if a round takes all tiles."""
    most = max_splits(tiles.num_tiles(*launch.writes[0].shape), launch.reads[0].shape[1], num_programs, tiles)
    return set() if most < 2 else {2, most}


def replayed(work: Callable[[], None], out: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """What work captured in a CUDA graph writes to `out`, the same in each replay; it held `before` each time."""
    out.copy_(before)
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    results = []
    for _ in range(NUM_REPLAYS):
        out.copy_(before)
        graph.replay()
        results.append(out.clone())
    torch.cuda.synchronize()
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


@NUM_TOKENS
@NUM_PROGRAMS
@TILES
@pytest.mark.parametrize("operation", list(SHAPES))
def test_linear(num_tokens: int, num_programs: int, tiles: GemmTiles, operation: str) -> None:
    launch = linear_case(num_tokens, SHAPES[operation], torch.bfloat16, GPU, has_bias="qkv" in operation)
    workspace, out = poisoned(num_programs), launch.writes[0]
    for num_splits in splits(launch, num_programs, tiles):

        def work(num_splits: int = num_splits) -> None:
            run_linear_split_k(launch, tiles, num_programs, workspace, num_splits)

        assert_linear(replayed(work, out, torch.full_like(out, torch.nan)), exact_linear(launch))
        assert not workspace.flags.any()


@NUM_TOKENS
@NUM_PROGRAMS
@TILES
@pytest.mark.parametrize("operation", list(ADDED_SHAPES))
def test_linear_add(num_tokens: int, num_programs: int, tiles: GemmTiles, operation: str) -> None:
    launch, expected = linear_add_case(num_tokens, ADDED_SHAPES[operation], torch.bfloat16, GPU)
    workspace, hidden = poisoned(num_programs), launch.writes[0]
    before = hidden.clone()
    for num_splits in splits(launch, num_programs, tiles):

        def work(num_splits: int = num_splits) -> None:
            run_linear_add_split_k(launch, tiles, num_programs, workspace, num_splits)

        assert_linear(replayed(work, hidden, before), expected)
        assert not workspace.flags.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_programs", [132, 84, 7])
@pytest.mark.parametrize("tiles", PART_TILES, ids=lambda tiles: f"{tiles.block_m}x{tiles.block_n} s{tiles.num_stages}")
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_any_cut_and_number_of_programs(
    dtype: torch.dtype, num_programs: int, tiles: GemmTiles, num_tokens: int
) -> None:
    """K and N end within a tile; of one token, many programs share each tile."""
    workspace = poisoned(num_programs)
    for has_bias in (False, True):
        launch = linear_case(num_tokens, (2984, 1000), dtype, GPU, has_bias=has_bias)
        whole.run_linear(launch, tiles, num_programs)
        assert_linear(launch.writes[0], exact_linear(launch))
        for num_splits in splits(launch, num_programs, tiles):
            launch.writes[0].fill_(torch.nan)
            run_linear_split_k(launch, tiles, num_programs, workspace, num_splits)
            assert_linear(launch.writes[0], exact_linear(launch))
        added, expected = linear_add_case(num_tokens, (2984, 1000), dtype, GPU, has_bias=has_bias)
        before = added.writes[0].clone()
        whole.run_linear_add(added, tiles, num_programs)
        assert_linear(added.writes[0], expected)
        for num_splits in splits(added, num_programs, tiles):
            added.writes[0].copy_(before)
            run_linear_add_split_k(added, tiles, num_programs, workspace, num_splits)
            assert_linear(added.writes[0], expected)
        assert_surroundings_untouched(added.writes[0])
        gated = linear_swiglu_case(num_tokens, (2992, 1000), dtype, GPU)
        whole.run_linear_swiglu(gated, tiles, num_programs)
        assert_linear_swiglu(gated.writes[0], exact_linear_swiglu(gated))


@NUM_TOKENS
@NUM_PROGRAMS
def test_kernels_of_a_partition(num_tokens: int, num_programs: int) -> None:
    """One workspace serves all products of a layer, one after the other."""
    kernels = kernels_on(REFERENCE_KERNELS, num_programs)
    for shape in SHAPES.values():
        launch = linear_case(num_tokens, shape, torch.bfloat16, GPU)
        kernels[OpKind.LINEAR](launch)
        assert_linear(launch.writes[0], exact_linear(launch))
    for shape in ADDED_SHAPES.values():
        added, expected = linear_add_case(num_tokens, shape, torch.bfloat16, GPU)
        kernels[OpKind.LINEAR_ADD](added)
        assert_linear(added.writes[0], expected)
    gated = linear_swiglu_case(num_tokens, GATE_UP, torch.bfloat16, GPU)
    kernels[OpKind.LINEAR_SWIGLU](gated)
    assert_linear_swiglu(gated.writes[0], exact_linear_swiglu(gated))


def test_a_workspace_is_not_made_while_a_graph_is_captured() -> None:
    launch, _ = linear_add_case(512, (4096, 4096), torch.bfloat16, GPU)
    _, num_splits = choose_split_cut(PART_TILES, (512, 4096, 4096), 100, card_of(GPU).shared_memory_bytes)
    assert num_splits > 1
    kernels_on(REFERENCE_KERNELS, 100)[OpKind.LINEAR_ADD](launch)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="run the product once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels_on(REFERENCE_KERNELS, 100)[OpKind.LINEAR_ADD](launch)


def run_beside_each_other(streams: list[torch.cuda.Stream], kernels: list[Kernels]) -> None:
    """Products of all sizes on all streams at once, each with a graph of its own."""
    launches = [[linear_case(1056, shape, torch.bfloat16, GPU) for shape in SHAPES.values()] for _ in streams]
    graphs = []
    torch.cuda.synchronize()
    for stream, of_stream, own in zip(streams, launches, kernels, strict=True):
        with torch.cuda.stream(stream):
            for launch in of_stream:
                own[OpKind.LINEAR](launch)
        # Waiting for the device would not wait for the streams of a partition.
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for launch in of_stream:
                own[OpKind.LINEAR](launch)
        graphs.append(graph)
    expected = [[launch.writes[0].clone() for launch in of_stream] for of_stream in launches]
    for of_stream in launches:
        for launch in of_stream:
            assert_linear(launch.writes[0], exact_linear(launch))
            launch.writes[0].fill_(torch.nan)
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    for stream in streams:
        stream.synchronize()
    for of_stream, results in zip(launches, expected, strict=True):
        for launch, result in zip(of_stream, results, strict=True):
            assert torch.equal(launch.writes[0], result)


@pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="partitions need cuda-python",
)
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_two_partitions_at_once(share: float) -> None:
    first, second = partition_pair(GPU, share)
    with closing(first), closing(second):
        lanes = (first, second)
        run_beside_each_other(
            [lane.stream for lane in lanes], [kernels_on(REFERENCE_KERNELS, lane.num_sms) for lane in lanes]
        )


def test_two_streams_that_wait_for_each_others_sms() -> None:
    """Not all programs are there at the same time; they only ever wait for some that came before."""
    num_sms = torch.cuda.get_device_properties(GPU).multi_processor_count
    streams = [torch.cuda.Stream(GPU) for _ in range(2)]  # type: ignore[no-untyped-call]
    run_beside_each_other(streams, [kernels_on(REFERENCE_KERNELS, num_sms - 16) for _ in streams])
