"""CUDA graphs: the same tokens as kernel by kernel, in every bucket that a mixed load visits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.executor import captured
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.plan.sequential import nanobatch_plan
from tests.driving import greedy, random_prompts, run_model
from tests.families import make_model

pytestmark = pytest.mark.gpu
PROMPTS = random_prompts(48, 131, longest=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return run_model(folder, PROMPTS, greedy(24), device="cuda", cuda_graphs=False).tokens


@pytest.mark.parametrize("budget", [50, 512])
@pytest.mark.parametrize("is_async", [False, True])
def test_graphs_give_the_same_tokens(folder: Path, expected: list[list[int]], budget: int, is_async: bool) -> None:
    run = run_model(folder, PROMPTS, greedy(24), device="cuda", max_batch_tokens=budget, async_scheduling=is_async)
    assert run.tokens == expected


def test_forgotten_graphs_are_captured_again(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "_MAX_GRAPHS", 2)
    assert run_model(folder, PROMPTS, greedy(24), device="cuda", max_batch_tokens=50).tokens == expected


def test_graphs_of_a_nano_batched_plan(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(nanobatch_plan(build_graph(load(folder), None), 64, [20, 40]).to_json())
    run = run_model(folder, PROMPTS, greedy(24), device="cuda", max_batch_tokens=64, plan=str(path))
    assert run.tokens == expected
