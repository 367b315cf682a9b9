"""Every family gives the tokens and logits that transformers gives, whatever the budget, plan, pages and schedule.

What runs by default: every family, without async scheduling and a budget that takes all prompts at once, with pages
that are too few for one of the two ways to schedule, and with one of the small budgets or one of the cuts of a plan.
Where the output projection is the embedding, which no schedule knows, logits are compared, and tokens of a few. All
combinations run with NANOFLOW_ALL_CASES=1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from nanoflow import LLM, SamplingParams
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan
from tests.all_cases import RUNS_ALL_CASES, part
from tests.driving import HuggingFace, expect_less, greedy, random_prompts, run_engine, run_model
from tests.families import FAMILIES, make_model
from tests.logits import prompt_logits

V = TypeVar("V")
MAX_TOKENS = 16
MANY_PROMPTS = random_prompts(32, 131, longest=90)
PROMPTS = MANY_PROMPTS[:16]
# A small budget makes many iterations of a prompt: a few prompts show all that it does.
NUM_PROMPTS = {7: 5, 16: 8}
BUDGETS = (*NUM_PROMPTS, *((64, 2048) if RUNS_ALL_CASES else ()))
MODELS = [f"{name}{tied}" for name in FAMILIES for tied in ("", " tied")]
# Of an attention with biases, with windows, and of experts.
SOME_TIED = part([*FAMILIES, "llama3 tied", "qwen2 tied", "gemma3 tied", "qwen3-moe tied"], of=MODELS)
# Cuts of a plan's batch.
CUTS = ((1,), (13, 40), (32,))


def in_turn(variants: Sequence[V], families: Sequence[str] = tuple(FAMILIES)) -> list[tuple[str, V]]:
    """Each of these families with one of the variants, or all models with all of them."""
    chosen = [(name, variants[place % len(variants)]) for place, name in enumerate(families)]
    return part(chosen, of=product(MODELS, variants))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on disk, and what transformers generates with it."""

    folder: Path
    expected: list[list[int]]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name, _, tied = request.param.partition(" ")
    folder = make_model(name, tmp_path_factory.mktemp(name), seed=1, tied=bool(tied))
    yield Case(folder=folder, expected=HuggingFace(folder).generate(PROMPTS, MAX_TOKENS))


@pytest.mark.parametrize(("case", "max_batch_tokens"), in_turn(BUDGETS, [*FAMILIES][::2]), indirect=["case"])
def test_greedy_tokens_under_every_token_budget(case: Case, max_batch_tokens: int) -> None:
    assert len({tuple(tokens) for tokens in case.expected}) > 8, "the model must have something to say"
    prompts = PROMPTS[: NUM_PROMPTS.get(max_batch_tokens)]
    run = run_model(case.folder, prompts, greedy(MAX_TOKENS), max_batch_tokens=max_batch_tokens)
    assert run.tokens == case.expected[: len(prompts)]


@pytest.mark.parametrize("case", SOME_TIED, indirect=True)
def test_greedy_tokens_without_async_scheduling(case: Case) -> None:
    assert run_model(case.folder, PROMPTS, greedy(MAX_TOKENS), async_scheduling=False).tokens == case.expected


@pytest.mark.parametrize(("case", "is_async"), in_turn((True, False)), indirect=["case"])
def test_greedy_tokens_under_preemption(case: Case, is_async: bool) -> None:
    """Requests that are expected to end early are let in and must then be sent back."""
    # Where every layer has a window a request never needs much, so fewer pages are too few.
    is_windowed = None not in build_graph(load(case.folder), None).windows
    engine = build_engine(
        EngineConfig(
            model=str(case.folder),
            max_num_seqs=64,
            page_size=4,
            num_pages=10 if is_windowed else 60,
            max_model_len=128,
            max_batch_tokens=8 if is_windowed else 64,
            async_scheduling=is_async,
        )
    )
    try:
        expect_less(engine, MAX_TOKENS)
        run = run_engine(engine, PROMPTS, greedy(MAX_TOKENS))
    finally:
        engine.close()
    assert run.tokens == case.expected
    assert run.num_preemptions > 0


@pytest.mark.parametrize(("case", "cut"), in_turn(CUTS, [*FAMILIES][1::2]), indirect=["case"])
def test_greedy_tokens_under_nano_batched_plans(case: Case, cut: tuple[int, ...], tmp_path: Path) -> None:
    graph = build_graph(load(case.folder), None)
    path = tmp_path / "plan.json"
    path.write_bytes(nanobatch_plan(graph, 64, cut).to_json())
    assert PipelinePlan.load(path).max_stage == 0
    run = run_model(case.folder, PROMPTS, greedy(MAX_TOKENS), max_batch_tokens=64, plan=str(path))
    assert run.tokens == case.expected


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(model: str, tmp_path: Path) -> None:
    name, _, tied = model.partition(" ")
    folder = make_model(name, tmp_path, seed=1, tied=bool(tied))
    prompt = random_prompts(1, 131, longest=1, seed=3)[0] + random_prompts(1, 131, longest=150, seed=5)[0]
    expected = HuggingFace(folder).logits(prompt)
    torch.testing.assert_close(prompt_logits(folder, prompt), expected, rtol=2e-4, atol=2e-4)


def test_vectors_are_those_of_the_states_that_transformers_gives(tmp_path: Path) -> None:
    """In parts and at once, beside completions, and however much of the prompt is cached."""
    folder = make_model("qwen3", tmp_path, seed=1)
    reference = HuggingFace(folder).model.model
    prompts = [*random_prompts(1, 131, longest=1, seed=3), random_prompts(1, 131, longest=75, seed=4)[0] * 2]
    with LLM(str(folder), dtype="float32", max_batch_tokens=32, max_model_len=256, skip_tokenizer_init=True) as llm:
        for pooling in ("last", "mean", "last", "mean"):
            llm.generate(prompts[1], SamplingParams(max_tokens=3, detokenize=False), use_tqdm=False)
            outputs = llm.embed(prompts, False, pooling=pooling, normalize=False)
            for prompt, output in zip(prompts, outputs, strict=True):
                states = reference(torch.tensor([prompt])).last_hidden_state[0].detach()
                expected = states[-1] if pooling == "last" else states.mean(0)
                torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected, rtol=2e-4, atol=2e-4)
            assert (outputs[1].num_cached_tokens > 0) == (pooling == "last")
        short = llm.embed(prompts[1], False, dimensions=5)[0].outputs.embedding
        assert len(short) == 5 and sum(x * x for x in short) == pytest.approx(1)


def test_longrope_beyond_the_trained_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts that are longer than the trained length have the long factors, shorter ones by default the short."""
    folder = make_model("phi4-mini", tmp_path, seed=1, original_max_position_embeddings=48)
    reference = HuggingFace(folder)
    for prompts, options in (
        ([prompt for prompt in MANY_PROMPTS if len(prompt) > 48][:4], {"max_model_len": 256}),
        ([prompt for prompt in MANY_PROMPTS if len(prompt) + MAX_TOKENS <= 48][:4], {}),
    ):
        assert len(prompts) == 4
        run = run_model(folder, prompts, greedy(MAX_TOKENS), max_batch_tokens=64, **options)
        assert run.tokens == reference.generate(prompts, MAX_TOKENS)
        assert ("max_model_len, at most 2048" in caplog.text) == (not options)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_tokens_differ_only_where_they_nearly_tie(name: str, tmp_path: Path) -> None:
    """At the first differing token, each side's token is among the other's five most probable."""
    folder = make_model(name, tmp_path, seed=1, dtype="bfloat16", std=0.12, expert_spread=0.1)
    reference = HuggingFace(folder, torch.bfloat16)
    expected = reference.generate(MANY_PROMPTS, MAX_TOKENS)
    run = run_model(folder, MANY_PROMPTS, greedy(MAX_TOKENS, logprobs=5), dtype="bfloat16")
    num_equal = 0
    for prompt, ours, top, theirs in zip(MANY_PROMPTS, run.tokens, run.top_tokens, expected, strict=True):
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            num_equal += 1
            continue
        assert ours[place] in reference.logits(prompt + ours[:place])[-1].topk(5).indices
        assert theirs[place] in top[place]
    # How many depends on the instructions of the CPU: 7 of Gemma 3 on one, 8 on another.
    assert num_equal >= len(MANY_PROMPTS) // 5
