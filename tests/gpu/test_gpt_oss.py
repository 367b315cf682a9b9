"""Attention with sinks in bfloat16 on a GPU, and experts in MXFP4, against a CPU on the same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.device.transfer import StagedCopier
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import OpKind, Scope
from nanoflow.kernels import triton_attention
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.hopper import attention as hopper_attention
from nanoflow.kernels.launch import BatchInputs, Launch
from nanoflow.models.config_json import load
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import load_weights
from tests.attention_cases import assert_close, cache_of, dims_of, exact, inputs_of, launch_of
from tests.driving import greedy, random_prompts, run_model
from tests.families import make_model
from tests.mxfp4 import write_twins

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
CHUNKS = [(0, 700), (512, 300), (1500, 2), (0, 1), (37, 129), (2000, 257)]
HEADS = (64, 8, 64)


def _launch(scope: Scope, window: int | None, inputs: BatchInputs, tokens: TokenRange) -> Launch:
    """An attention of gpt-oss; its sinks reach from next to nothing to most of a softmax."""
    dims = dataclasses.replace(dims_of(HEADS, window), has_sinks=True)
    q = torch.randn(tokens.num_tokens, dims.q_width, device=inputs.token_ids.device).bfloat16()
    launch = launch_of(scope, dims, tokens, q, inputs, cache_of(inputs, dims))
    sinks = torch.linspace(-4.0, 9.0, dims.num_heads, device=q.device)
    return dataclasses.replace(launch, op=dataclasses.replace(launch.op, weights=("sinks",)), weights=(sinks,))


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("num", "longest"), [(300, 900), (48, 3000), (2, 20000)])
def test_decode_with_sinks(window: int | None, num: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests with long contexts are divided into parts, which must have a sink once."""
    decodes = [(int(before), 1) for before in np.random.default_rng(num).integers(0, longest, num)]
    inputs = inputs_of(decodes, num, GPU, monkeypatch)
    launch = _launch(Scope.DECODE, window, inputs, TokenRange(start=0, stop=num))
    triton_attention.decode_attention(launch)
    assert_close(launch.writes[0], exact(launch))


@pytest.mark.parametrize("window", [None, 128])
def test_prefill_with_sinks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(CHUNKS, 0, GPU, monkeypatch)
    launch = _launch(Scope.PREFILL, window, inputs, TokenRange(start=0, stop=inputs.num_tokens))
    triton_attention.prefill_attention(launch)
    assert_close(launch.writes[0], exact(launch))


def test_a_cuda_graph_captures_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of([(3000, 1), (17, 1)], 2, GPU, monkeypatch)
    launch = _launch(Scope.DECODE, None, inputs, TokenRange(start=0, stop=2))
    triton_attention.decode_attention(launch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_attention.decode_attention(launch)
    launch.weights[0].add_(2.0)
    launch.writes[0].fill_(torch.nan)
    graph.replay()
    assert_close(launch.writes[0], exact(launch))


def test_gpt_oss_has_fast_attention_in_all_layers() -> None:
    kernels = kernels_for(GPU, torch.bfloat16, build_graph(preset_config("gpt-oss-20b"), None).layer_operations)
    decode, prefill = (kernels[kind] for kind in (OpKind.DECODE_ATTENTION, OpKind.PREFILL_ATTENTION))
    assert prefill is triton_attention.prefill_attention
    assert decode in (triton_attention.decode_attention, hopper_attention.decode_attention)


@pytest.mark.parametrize("is_packed", [False, True])
def test_experts_are_the_same_on_a_gpu(is_packed: bool, tmp_path: Path) -> None:
    """Several threads copy matrices that are transposed, out of order, or packed."""
    twin = write_twins(make_model("gpt-oss", tmp_path))
    graph, cpu = build_graph(load(tmp_path), None), torch.device("cpu")
    folder = tmp_path if is_packed else twin
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_weights(graph, folder, dtype, GPU, show_progress=False, make_copier=StagedCopier)
        theirs = load_weights(graph, folder, dtype, cpu, show_progress=False)
        for one, other in zip((ours.shared, *ours.layers), (theirs.shared, *theirs.layers), strict=True):
            assert all(torch.equal(one[name].cpu(), other[name]) for name in other)


def test_tokens_of_a_model_in_mxfp4(tmp_path: Path) -> None:
    """Contexts of several windows, chunks, and CUDA graphs where the kernels allow them."""
    write_twins(make_model("gpt-oss", tmp_path, seed=1))
    prompts = random_prompts(24, 131, longest=120)
    expected, ours = (
        run_model(tmp_path, prompts, greedy(24), device=device, max_num_seqs=24, max_batch_tokens=64).tokens
        for device in ("cpu", "cuda")
    )
    assert len({tuple(tokens) for tokens in expected}) > 12, "the model must have something to say"
    assert ours == expected
