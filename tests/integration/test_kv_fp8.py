"""A KV cache in 8 bits, end to end on a CPU: tokens do not depend on how the cache is used, and are nearly the same."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from nanoflow.engine.llm import LLM
from nanoflow.graph.operation import KvType
from nanoflow.kernels import reference
from nanoflow.kernels.kv_fp8 import quantised
from nanoflow.models.config_json import load
from nanoflow.models.locate import locate_model
from nanoflow.models.registry import build_graph
from nanoflow.outputs import RequestOutput
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.request import SamplingParams
from nanoflow.scheduler.load_gain import LoadGain
from tests.driving import expect_less, random_prompts
from tests.families import make_model
from tests.logits import prompt_logits

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "num_threads": 1,
    "skip_tokenizer_init": True,
    "num_pages": 28,
    "max_batch_tokens": 96,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_dtype": "fp8",
}
VOCAB_SIZE = 131
PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=14, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are random and large, so that rounding keys and values changes its tokens."""
    return make_model("llama3", tmp_path_factory.mktemp("llama3"), seed=1)


def open_llm(model: Path, **options: Any) -> LLM:
    return LLM(str(model), **{**OPTIONS, **options})


def rounds(llm: LLM, vocab_size: int = VOCAB_SIZE) -> list[list[list[int]]]:
    """Tokens of two rounds of conversations with common beginnings."""
    rng, told = random.Random(2), []
    beginning, *prompts = (
        [rng.randrange(4, vocab_size) for _ in range(length)] for length in (40, *range(70, 130, 12))
    )
    prompts = [[*beginning[: 40 * (place % 2)], *prompt] for place, prompt in enumerate(prompts)]
    for _ in range(2):
        outputs: list[RequestOutput] = llm.generate(
            [{"prompt_token_ids": each} for each in prompts], PARAMS, use_tqdm=False
        )
        llm._engine.check_integrity()
        told.append([output.outputs[0].token_ids for output in outputs])
        prompts = [[*prompt, *answer, 7] for prompt, answer in zip(prompts, told[-1], strict=True)]
    return told


# Of 10 completions. Where batches are cut otherwise sums differ in their last digits, which may round an element in 8
# bits to its other neighbour, a sixteenth away.
MOST = 8


def num_equal(one: list[list[list[int]]], other: list[list[list[int]]]) -> int:
    """Completions that are the same."""
    return sum(a == b for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


def test_tokens_do_not_depend_on_preemption_prefix_cache_and_tiers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadGain, "is_worth", lambda *_: True)
    with closing(open_llm(model, num_pages=400, enable_prefix_caching=False, max_batch_tokens=512)) as llm:
        expected = rounds(llm)
        assert llm._engine.stats().num_preemptions == 0
    with closing(open_llm(model, num_pages=400, kv_cache_dtype="auto")) as llm:
        assert num_equal(rounds(llm), expected) < 6, "the type must make a difference in this test"
    for tiers in ({}, {"kv_host_gib": 0.02}, {"kv_host_gib": 0.0004, "kv_dir": str(tmp_path)}):
        with closing(open_llm(model, **tiers)) as llm:
            expect_less(llm._engine, 4)
            assert num_equal(rounds(llm), expected) >= MOST, tiers
            stats = llm._engine.stats()
            assert stats.num_preemptions > 0 and llm._engine.facts.kv_cache_dtype == "fp8_e4m3"
            assert not tiers or stats.tiers["host"].loaded_bytes > 0


def test_tokens_do_not_depend_on_budget_plan_drafts_and_windows(model: Path, tmp_path: Path) -> None:
    with closing(open_llm(model, num_pages=400)) as llm:
        expected = rounds(llm)
    plan = tmp_path / "plan.json"
    plan.write_bytes(nanobatch_plan(build_graph(load(model), None), 96, [13, 40]).to_json())
    for way in ({"plan": str(plan)}, {"max_batch_tokens": 40, "speculative": "ngram:3:3:1"}):
        with closing(open_llm(model, num_pages=400, **way)) as llm:
            assert num_equal(rounds(llm), expected) >= MOST, way
    windowed = make_model("gemma3", tmp_path, seed=1)
    found = []
    for options in ({"num_pages": 400, "max_batch_tokens": 512}, {}):
        with closing(open_llm(windowed, **options)) as llm:
            found.append(rounds(llm, vocab_size=100))
    assert num_equal(*found) >= MOST


def test_pages_on_disk_are_of_one_type(model: Path, tmp_path: Path) -> None:
    prompt = random_prompts(1, VOCAB_SIZE, longest=1, seed=3)[0] * 100
    cached = []
    for kv_type in ("fp8", "auto", "fp8"):
        with closing(open_llm(model, kv_dir=str(tmp_path), kv_disk_gib=0.1, kv_cache_dtype=kv_type)) as llm:
            (output,) = llm.generate([{"prompt_token_ids": prompt}], PARAMS, use_tqdm=False)
            cached.append(output.num_cached_tokens)
    assert cached == [0, 0, len(prompt) // 16 * 16]


def test_the_memory_holds_more_pages(model: Path) -> None:
    """A vector of 16 elements takes 18 bytes in 8 bits, and 64 in float32."""
    pages = {}
    for kv_type in ("auto", "fp8"):
        options = {"num_pages": None, "kv_cache_gib": 0.0005, "max_num_seqs": 32, "kv_cache_dtype": kv_type}
        with closing(open_llm(model, **options)) as llm:
            pages[kv_type] = llm._engine.facts.num_pages
            assert llm._engine.facts.page_bytes == ({"auto": 64, "fp8": 18}[kv_type] * 2 * 2 * 3 * 16,)
    assert pages == {"auto": int(0.0005 * 2**30) // 12288, "fp8": int(0.0005 * 2**30) // 3456}


def divergence(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of each row of logits, in nats."""
    p, q = exact.log_softmax(-1), rounded.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def twice(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantised` with scales that are wrong."""
    numbers, scales = quantised(vectors)
    return numbers, scales * 2


@pytest.mark.parametrize("is_broken", [False, True], ids=["right", "wrong scales"])
def test_the_embedded_model_predicts_as_with_16_bits(is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate_model("default")
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:800]
    exact = prompt_logits(folder, ids)
    if is_broken:
        monkeypatch.setattr(reference, "quantised", twice)
    rounded = prompt_logits(folder, ids, KvType.FP8)
    losses = [
        float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))) for logits in (exact, rounded)
    ]
    is_close = (
        divergence(exact, rounded).mean() < 0.006
        and (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.95
        and abs(losses[1] - losses[0]) < 0.02
    )
    assert is_close != is_broken


@pytest.mark.parametrize("is_broken", [False, True], ids=["right", "wrong scales"])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_tiny_models_predict_about_as_with_32_bits(
    name: str, is_broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights are random and large, so that a small error moves many probabilities."""
    folder = make_model(name, tmp_path, seed=1)
    (prompt,) = random_prompts(1, 100, longest=150, seed=5)
    exact = prompt_logits(folder, prompt)
    if is_broken:
        monkeypatch.setattr(reference, "quantised", twice)
    rounded = prompt_logits(folder, prompt, KvType.FP8)
    is_close = divergence(exact, rounded).mean() < 0.3 and (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.6
    assert is_close != is_broken
