"""Plans with lanes on a GPU give the tokens of the sequential plan, eagerly and in CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.hopper import can_carry
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.search.carry import carry_plan
from tests.driving import Run, greedy, random_prompts, run_model
from tests.families import make_model
from tests.plans import ping_pong_plan

pytestmark = pytest.mark.gpu
PROMPTS = random_prompts(48, 131, longest=120)
MAX_TOKENS = 24


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("budget", [64, 256])
def test_streams_give_the_same_tokens(tmp_path: Path, cuda_graphs: bool, budget: int) -> None:
    folder = make_model("qwen3", tmp_path, seed=1)
    path = tmp_path / "plan.json"
    graph = build_graph(load(folder), None)
    path.write_bytes(ping_pong_plan(graph, budget, 40, Mechanism.STREAM).to_json())
    options = {"device": "cuda", "max_batch_tokens": budget}
    expected = run_model(folder, PROMPTS, greedy(MAX_TOKENS), **options).tokens
    for _ in range(2):
        run = run_model(folder, PROMPTS, greedy(MAX_TOKENS), **options, cuda_graphs=cuda_graphs, plan=str(path))
        assert run.tokens == expected


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("mechanism", [Mechanism.PARTITION, Mechanism.BESIDE])
def test_lanes_differ_only_where_tokens_nearly_tie(tmp_path: Path, cuda_graphs: bool, mechanism: Mechanism) -> None:
    """At the first differing token, each side's token is among the other's five most probable."""
    pytest.importorskip("cuda.bindings")
    folder = make_model("llama3", tmp_path, seed=1, dtype="bfloat16", std=0.12)
    path = tmp_path / "plan.json"
    graph = build_graph(load(folder), None)
    if OpKind.LINEAR_SWIGLU not in kernels_for(torch.device("cuda"), torch.bfloat16, graph.layer):
        pytest.skip("products cannot be restricted to a part of this GPU")
    graph = fuse_swiglu(graph)
    path.write_bytes(ping_pong_plan(graph, 64, 40, mechanism, share=84 / 132).to_json())
    options = {"device": "cuda", "max_batch_tokens": 64, "dtype": "bfloat16", "max_num_seqs": len(PROMPTS)}
    params = greedy(MAX_TOKENS, logprobs=5)
    ours = run_model(folder, PROMPTS, params, **options, cuda_graphs=cuda_graphs, plan=str(path))
    theirs = run_model(folder, PROMPTS, params, **options)
    assert_nearly_equal(ours, theirs)


def assert_nearly_equal(ours: Run, theirs: Run) -> None:
    num_equal = 0
    for our_tokens, our_top, their_tokens, their_top in zip(
        ours.tokens, ours.top_tokens, theirs.tokens, theirs.top_tokens, strict=True
    ):
        pairs = enumerate(zip(our_tokens, their_tokens, strict=True))
        place = next((i for i, pair in pairs if pair[0] != pair[1]), None)
        if place is None:
            num_equal += 1
            continue
        assert our_tokens[place] in their_top[place] and their_tokens[place] in our_top[place]
    assert num_equal >= len(PROMPTS) // 4


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(("budget", "quantization"), [(64, "none"), (256, "none"), (256, "fp8")])
def test_attention_inside_products_differs_only_where_tokens_nearly_tie(
    tmp_path: Path, cuda_graphs: bool, budget: int, quantization: str
) -> None:
    """As above; batches are smaller than the plan too, so that some products carry nothing.

    In FP8 other sums round some numbers to their neighbours, so there are fewer tokens that could differ.
    """
    is_fp8 = quantization == "fp8"
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "std": 0.05} if is_fp8 else {"std": 0.12}
    folder = make_model("llama3", tmp_path, seed=1, dtype="bfloat16", head_dim=64, **sizes)
    graph = build_graph(load(folder), None)
    if not can_carry(torch.device("cuda"), torch.bfloat16, graph.kinds[0].attention):
        pytest.skip("products of this GPU carry nothing")
    path = tmp_path / "plan.json"
    served = fuse_swiglu(in_fp8(graph) if is_fp8 else graph)
    path.write_bytes(carry_plan(served, budget, 40, 0.8).to_json())
    options = {"device": "cuda", "max_batch_tokens": budget, "dtype": "bfloat16", "max_num_seqs": len(PROMPTS)}
    options["quantization"] = quantization
    params = greedy(4 if is_fp8 else MAX_TOKENS, logprobs=5)
    ours = run_model(folder, PROMPTS, params, **options, cuda_graphs=cuda_graphs, plan=str(path))
    assert_nearly_equal(ours, run_model(folder, PROMPTS, params, **options))
