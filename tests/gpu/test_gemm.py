"""Triton products on a GPU at the sizes of Llama-3-8B and Llama-3.2-1B, against the same numbers summed in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.kernels import reference
from nanoflow.kernels import triton_gemm as fast
from nanoflow.kernels.gemm_tiles import GEMM_TILES, GemmTiles
from tests.gemm_cases import (
    assert_linear,
    assert_linear_swiglu,
    exact_linear,
    exact_linear_swiglu,
    linear_case,
    linear_swiglu_case,
)

GPU = torch.device("cuda")
if not fast.has_tma(GPU):
    pytest.skip("needs a GPU with a tensor memory accelerator", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
NUM_TOKENS = pytest.mark.parametrize("num_tokens", [1, 17, 128, 300, 1024, 2048])
SHAPES = {
    "8b qkv_proj": (6144, 4096),
    "8b o_proj": (4096, 4096),
    "8b down_proj": (4096, 14336),
    "1b qkv_proj": (3072, 2048),
    "1b o_proj": (2048, 2048),
    "1b down_proj": (2048, 8192),
}
GATE_UP_SHAPES = {"8b": (28672, 4096), "1b": (16384, 2048)}


@DTYPES
@NUM_TOKENS
@pytest.mark.parametrize("operation", list(SHAPES))
def test_linear(dtype: torch.dtype, num_tokens: int, operation: str) -> None:
    launch = linear_case(num_tokens, SHAPES[operation], dtype, GPU, has_bias="qkv" in operation)
    fast.run_linear(launch, *fast.choose_cut(launch))
    assert_linear(launch.writes[0], exact_linear(launch))


@DTYPES
@NUM_TOKENS
@pytest.mark.parametrize("model", list(GATE_UP_SHAPES))
def test_linear_swiglu(dtype: torch.dtype, num_tokens: int, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, however few the tokens."""
    monkeypatch.setattr(fast, "_MIN_FUSED_TOKENS", 1)
    launch = linear_swiglu_case(num_tokens, GATE_UP_SHAPES[model], dtype, GPU)
    fast.linear_swiglu(launch)
    assert_linear_swiglu(launch.writes[0], exact_linear_swiglu(launch))


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 127])
def test_linear_swiglu_of_few_tokens_is_cublas_and_swiglu(dtype: torch.dtype, num_tokens: int) -> None:
    launch = linear_swiglu_case(num_tokens, GATE_UP_SHAPES["1b"], dtype, GPU)
    expected = torch.empty_like(launch.writes[0])
    reference.linear_swiglu(replace(launch, writes=(expected,)))
    fast.linear_swiglu(launch)
    assert_linear_swiglu(launch.writes[0], expected)


@DTYPES
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_add_in_a_captured_graph(dtype: torch.dtype, has_bias: bool) -> None:
    """cuBLAS adds to the rows in place, once a replay."""
    launch = linear_case(300, (2048, 8192), dtype, GPU, has_bias=has_bias)
    stream = torch.randn((302, 2048), device=GPU).to(dtype)
    launch = replace(launch, reads=(*launch.reads, stream[1:-1]), writes=(stream[1:-1],))
    reference.linear_add(replace(launch, writes=(stream[1:-1].clone(),)))
    expected = stream.double()
    expected[1:-1] += launch.reads[0].double() @ launch.weights[0].double().t()
    expected[1:-1] += launch.weights[1].double() if has_bias else 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reference.linear_add(launch)
    graph.replay()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(stream.double(), expected, rtol=2 * step, atol=8 * step)


@pytest.mark.parametrize("num_programs", [132, 84, 7])
@pytest.mark.parametrize("tiles", GEMM_TILES, ids=lambda tiles: f"{tiles.block_m}x{tiles.block_n} s{tiles.num_stages}")
def test_any_cut_and_number_of_programs(num_programs: int, tiles: GemmTiles) -> None:
    """K and N end within a tile."""
    launch = linear_case(300, (2984, 1000), torch.bfloat16, GPU, has_bias=True)
    fast.run_linear(launch, tiles, num_programs)
    assert_linear(launch.writes[0], exact_linear(launch))
    launch = linear_swiglu_case(300, (2992, 1000), torch.bfloat16, GPU)
    fast.run_linear_swiglu(launch, tiles, num_programs)
    assert_linear_swiglu(launch.writes[0], exact_linear_swiglu(launch))


def test_a_captured_graph_serves_other_numbers() -> None:
    linear = linear_case(300, (6144, 4096), torch.bfloat16, GPU)
    fused = linear_swiglu_case(300, (16384, 2048), torch.bfloat16, GPU)
    fast.run_linear(linear, *fast.choose_cut(linear))
    fast.linear_swiglu(fused)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast.run_linear(linear, *fast.choose_cut(linear))
        fast.linear_swiglu(fused)
    for launch in (linear, fused):
        launch.reads[0].normal_()
        launch.writes[0].fill_(torch.nan)
    graph.replay()
    assert_linear(linear.writes[0], exact_linear(linear))
    assert_linear_swiglu(fused.writes[0], exact_linear_swiglu(fused))
