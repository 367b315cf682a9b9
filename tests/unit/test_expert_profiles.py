"""Experts in profiles, in searches and in models with random weights: what is measured, found, and drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoflow.cli.main import main
from nanoflow.executor.buffers import DeviceModel, Workspace, allocate_caches
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.models.config_json import parse
from nanoflow.models.moe import with_skew
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import random_weights
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import PipelinePlan
from nanoflow.profile.table import Profile, ProfileError, write_profile
from nanoflow.profiler import pairs
from nanoflow.profiler.pairs import pair_tasks
from nanoflow.profiler.profile import Job, new_job
from nanoflow.profiler.site import Site, equal_requests, over_layers, random_workspace
from nanoflow.profiler.work import Sizes, tasks
from nanoflow.simulate.iteration import graphs_of

CPU = torch.device("cpu")
QWEN3 = build_graph(preset_config("qwen3-30b-a3b"), None)
SMALL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}
ON_GPU = Site(graph=QWEN3, device=torch.device("cuda", 0), dtype=torch.bfloat16, page_size=16)


@pytest.mark.parametrize("can_be_captured", [True, False])
def test_experts_are_measured_beside_attention(can_be_captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless their kernels read on the host, as those of a model in float32 do."""
    kernel = REFERENCE_KERNELS[OpKind.LINEAR if can_be_captured else OpKind.EXPERTS_IN]
    grouped = {OpKind.LINEAR_SWIGLU: kernel, OpKind.EXPERTS_IN: kernel, OpKind.EXPERTS_OUT: kernel}
    monkeypatch.setattr(pairs, "kernels_for", lambda *_: grouped)
    monkeypatch.setattr("nanoflow.kernels.dispatch._READING_ON_HOST", {REFERENCE_KERNELS[OpKind.EXPERTS_IN]})
    found = pair_tasks(ON_GPU, 2048, 132)
    firsts = {name: {p.mechanism for p in found if p.first.operation == name} for name in ("o_proj", "experts_in")}
    assert firsts["o_proj"] >= {Mechanism.PARTITION, Mechanism.BESIDE}
    assert firsts["experts_in"] == (firsts["o_proj"] if can_be_captured else set())


def test_experts_are_measured_at_few_tokens_too() -> None:
    """A few tokens do not touch all experts, so the least of a dense product's sizes says nothing of them."""
    found = tasks(ON_GPU, Sizes(max_tokens=2048))
    sizes = {name: [t.num_tokens for t in found if t.operation == name] for name in ("experts_out", "o_proj", "router")}
    assert sizes["experts_out"] == [1, 16, 64, *sizes["o_proj"]] and sizes["router"] == sizes["o_proj"]
    assert [t.num_tokens for t in tasks(ON_GPU, Sizes(max_tokens=16)) if t.operation == "experts_in"] == [1, 16]


@pytest.mark.parametrize(
    ("model", "gpus", "can_win"),
    [("qwen3-30b-a3b", "a100-80", True), ("qwen3-30b-a3b", "h200", False), ("mixtral-8x7b", "h200", False)],
)
def test_a_search_on_estimates(
    model: str, gpus: str, can_win: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On an A100 attention runs beside experts. An H200 has no power left for that, and says so by its energy."""
    profile, path = str(tmp_path / "profile.json"), tmp_path / "plan.json"
    assert main(["profile", f"preset:{model}", "-o", profile, "--estimate", gpus]) == 0
    batch = ["--max-batch-tokens", "2048", "--decodes", "1920", "--context", "1280"]
    assert main(["search", profile, "-o", str(path), *batch, "--time-limit", "20"]) == 0
    plan = PipelinePlan.load(path)
    plan.validate(build_graph(preset_config(model), None))
    lanes = {nano.lane for nano in plan.nano_operations if nano.operation == "experts_in"}
    beside = {nano.lane for nano in plan.nano_operations if nano.operation == "decode_attention"}
    assert lanes.isdisjoint(beside) is can_win
    assert ("x of sequential" in capsys.readouterr().out) is can_win


@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_experts_are_measured_with_the_rows_that_a_skew_gives_them(skew: float) -> None:
    """With a skew of 2 expert 0 is chosen by nearly all tokens, 60 % and more of the rows go to a quarter of them."""
    graph = with_skew(build_graph(parse(SMALL), None), skew)
    site = Site(graph=graph, device=CPU, dtype=torch.float32, page_size=16)
    weights = random_weights(graph, torch.float32, CPU, seed=0)
    workspace = random_workspace(site, graph, weights, num_pages=16, num_tokens=256, num_rows=1)
    over_layers(workspace, lambda op: op.kind is OpKind.EXPERTS_IN, equal_requests(1, 0, 256, 16))
    ends = workspace.tensors["expert_ends"][0].tolist()
    assert ends[-1] == 1024 and ends == sorted(ends)
    # Chosen evenly, an expert has 64 rows and four have 256.
    assert (ends[0] > 150 and ends[3] > 500) is (skew > 0.0)


def test_a_profile_says_how_evenly_experts_were_chosen(tmp_path: Path) -> None:
    """Few tokens read fewer experts if they choose unevenly; a profile is not continued with another skew."""
    profiles = {}
    for skew in ("0", "1.5"):
        path = tmp_path / f"{skew}.json"
        command = ["profile", "preset:qwen3-30b-a3b", "-o", str(path), "--estimate", "h200", "--expert-skew", skew]
        assert main([*command, "--max-batch-tokens", "128"]) == 0
        profiles[skew] = Profile.load(path)
        assert profiles[skew].expert_skew == float(skew)
    times = {
        skew: {point.operation: point.time_s for point in profile.points if point.num_tokens == 64}
        for skew, profile in profiles.items()
    }
    assert times["1.5"]["experts_in"] < 0.8 * times["0"]["experts_in"]
    assert times["1.5"]["o_proj"] == times["0"]["o_proj"]
    (graph,) = graphs_of(profiles["1.5"])
    assert graph == with_skew(QWEN3, 1.5)


def test_a_profile_with_another_skew_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"

    def job(skew: float) -> Job:
        return new_job(
            "small",
            SMALL,
            device=CPU,
            dtype=torch.float32,
            sizes=Sizes.small(16),
            path=path,
            only="alone",
            expert_skew=skew,
        )

    write_profile(job(1.0).profile, path)
    assert job(1.0).profile.expert_skew == 1.0
    with pytest.raises(ProfileError, match=r"expert_skew 1\.0, not 0\.0"):
        job(0.0)


def test_random_routers_choose_evenly() -> None:
    """The busiest expert has less than twice the rows of the average one, in every layer."""
    graph = build_graph(parse(SMALL), None)
    loads: list[torch.Tensor] = []

    def order(launch: Launch) -> None:
        loads.append(torch.bincount(launch.reads[0].flatten(), minlength=16))
        REFERENCE_KERNELS[OpKind.EXPERT_ORDER](launch)

    model = DeviceModel(
        graph=graph,
        dtype=torch.float32,
        weights=random_weights(graph, torch.float32, CPU, seed=0),
        caches=allocate_caches(graph, num_pages=16, page_size=16, dtype=torch.float32, device=CPU),
        kernels={**REFERENCE_KERNELS, OpKind.EXPERT_ORDER: order},
    )
    batch = equal_requests(1, 0, 256, 16)
    batch = replace(batch, token_ids=np.random.default_rng(0).integers(0, 512, 256, dtype=np.int32))
    inputs = InputBuilder(graph.ropes, num_rows=1, device=CPU).build(batch)
    workspace = Workspace.allocate(model, num_tokens=256, num_logits=1)
    workspace.run_whole(graph.prologue, inputs)
    for layer, kind in enumerate(graph.layers):
        workspace.run_whole(kind.operations, inputs, layer)
    assert len(loads) == 8 and all(int(load.sum()) == 1024 for load in loads)
    assert max(int(load.max()) for load in loads) < 2 * 64
