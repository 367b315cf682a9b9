"""Speculation through the whole engine: answers are those without it, and the statistics say what came of it."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.request import Request
from tests.driving import Run, expect_less, greedy, random_prompts, run_engine
from tests.families import EOS_TOKEN_ID, make_model
from tests.server_process import running_server

# Parts of prompts that come again, so that something is found from the first token on.
PROMPTS = [prompt * 3 for prompt in random_prompts(12, 131, longest=12, seed=4)]
FAMILIES = ("llama3", "qwen2-sliding")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param), seed=2)


def engine_of(folder: Path, speculative: str | None, **options: Any) -> Engine:
    """An engine that goes on as if nothing had been measured: small batches have drafts whatever this machine takes."""
    common = {"dtype": "float32", "max_num_seqs": 16, "max_batch_tokens": 600, "speculative": speculative}
    engine = build_engine(EngineConfig(model=str(folder), **{**common, **options}))
    engine._times = None
    return engine


def run(folder: Path, speculative: str | None, params: SamplingParams, **options: Any) -> tuple[Run, int]:
    """What the prompts give, and how many guessed tokens were right."""
    engine = engine_of(folder, speculative, **options)
    try:
        if "num_pages" in options:
            expect_less(engine, 30)
        result = run_engine(engine, PROMPTS, params)
        stats = engine.stats()
        assert stats.num_accepted_tokens <= stats.num_draft_tokens
        if speculative is not None:
            assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
        return result, stats.num_accepted_tokens
    finally:
        engine.close()


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(("allowed", "least"), [(None, 1), ([5, 6, 7], 80)], ids=["few right", "many right"])
def test_greedy_tokens_are_those_without(folder: Path, is_async: bool, allowed: list[int] | None, least: int) -> None:
    params = greedy(32, allowed_token_ids=allowed)
    expected, _ = run(folder, None, params)
    drafted, num_right = run(folder, "ngram:4:3:1", params, async_scheduling=is_async)
    assert drafted.tokens == expected.tokens
    assert num_right >= least


def test_greedy_tokens_are_those_without_when_requests_are_preempted(folder: Path) -> None:
    tight = {"page_size": 4, "num_pages": 40, "max_model_len": 96}
    expected, _ = run(folder, None, greedy(50), max_model_len=96)
    drafted, _ = run(folder, "ngram:4:3:1", greedy(50), **tight)
    assert drafted.num_preemptions > 0
    assert drafted.tokens == expected.tokens


def test_seeded_tokens_and_log_probabilities_are_those_without(folder: Path) -> None:
    params = SamplingParams(temperature=0.4, top_k=5, max_tokens=40, ignore_eos=True, logprobs=2)
    expected, _ = run(folder, None, params)
    drafted, _ = run(folder, "ngram:3:2:1", params)
    assert drafted.tokens == expected.tokens
    assert drafted.top_tokens == expected.top_tokens


MIXED = [
    SamplingParams(temperature=0.0, min_tokens=20, max_tokens=40, stop_token_ids=list(range(20, 60))),
    SamplingParams(temperature=0.0, max_tokens=40, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logit_bias={5: 100.0}),
    SamplingParams(temperature=0.3, max_tokens=40, ignore_eos=True, allowed_token_ids=[7, 8, 9]),
    SamplingParams(temperature=0.5, max_tokens=40, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=7, stop_token_ids=[EOS_TOKEN_ID]),
]


def _mixed(engine: Engine, aborted_at: int | None = None) -> list[list[int]]:
    """Tokens of requests with all kinds of parameters; the first is aborted after so many steps."""
    for place, (prompt, params) in enumerate(zip(PROMPTS, MIXED * 2, strict=False)):
        request = Request(
            request_id=place,
            prompt_token_ids=prompt,
            params=params,
            seed=place,
            max_tokens=params.max_tokens or 16,
            eos_token_ids=() if params.ignore_eos else (EOS_TOKEN_ID,),
        )
        engine.add(request)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    num_steps = 0
    while engine.has_work:
        output = engine.step()
        num_steps += 1
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            tokens[request_id].append(token_id)
        if num_steps == aborted_at:
            engine.abort([0])
    engine.check_integrity()
    assert engine.stats().pages_in_use == 0
    return tokens


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_all_kinds_of_parameters_beside_each_other(folder: Path, is_async: bool) -> None:
    plain = engine_of(folder, None)
    drafting = engine_of(folder, "ngram:5:3:1", async_scheduling=is_async)
    try:
        expected = _mixed(plain)
        assert _mixed(drafting) == expected
        assert drafting.stats().num_accepted_tokens > 10
        assert drafting.stats().num_undrafted_requests == 3
        for num_steps in (3, 5):
            assert _mixed(drafting, aborted_at=num_steps)[1:] == expected[1:]
    finally:
        plain.close()
        drafting.close()


def _second_tokens(engine: Engine, first_seed: int, count: int) -> Counter[tuple[int, ...]]:
    """How often each end of a completion was drawn."""
    params = SamplingParams(
        temperature=0.8, top_k=3, max_tokens=3, ignore_eos=True, allowed_token_ids=list(range(4, 60))
    )
    ends: Counter[tuple[int, ...]] = Counter()
    # Every token is followed by another one somewhere in the prompt, so that each first token has a draft.
    prompt = list(range(4, 60))
    for start in range(first_seed, first_seed + count, 10):
        tokens: dict[int, list[int]] = {seed: [] for seed in range(start, start + 10)}
        for seed in tokens:
            engine.add(
                Request(
                    request_id=seed,
                    prompt_token_ids=prompt,
                    params=params,
                    seed=seed,
                    max_tokens=3,
                    eos_token_ids=(),
                )
            )
        while engine.has_work:
            output = engine.step()
            for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
                tokens[request_id].append(token_id)
        ends.update(tuple(drawn[1:]) for drawn in tokens.values())
    return ends


def test_samples_have_the_distribution_that_they_have_without(tmp_path: Path) -> None:
    """Two samples of completions, with other seeds: chi-square over those that are not rare."""
    folder = make_model("llama3", tmp_path, seed=2)
    plain, drafting, count = engine_of(folder, None), engine_of(folder, "ngram:2:1:1"), 600
    try:
        without, with_drafts = _second_tokens(plain, 0, count), _second_tokens(drafting, count, count)
        stats = drafting.stats()
        assert stats.num_draft_tokens > count / 3 and 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    finally:
        plain.close()
        drafting.close()
    kinds = [kind for kind in without | with_drafts if without[kind] + with_drafts[kind] >= 20]
    rows = np.array([[counts[kind] for kind in kinds] for counts in (without, with_drafts)], float)
    rows = np.c_[rows, count - rows.sum(1)]
    expected = rows.sum(0) / 2
    chi_square = float(((rows - expected) ** 2 / np.maximum(expected, 1)).sum())
    num_free = rows.shape[1] - 1
    # Five standard deviations above the mean of the distribution.
    assert num_free >= 4 and chi_square < num_free + 5 * (2 * num_free) ** 0.5


TEXTS = ["def add(a, b):\n    return a + b\n\n" * 3, "one two three four five one two three four", "The cat sat. " * 5]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LLM, LLM]]:
    """The embedded model without and with drafts."""
    with LLM(max_num_seqs=8) as plain, LLM(max_num_seqs=8, speculative="ngram:6:3:1") as drafting:
        drafting._engine._times = None
        yield plain, drafting


def _shown(outputs: Sequence[RequestOutput]) -> list[Any]:
    return [
        (one.text, one.token_ids, one.finish_reason, one.stop_reason, [sorted(row) for row in one.logprobs or ()])
        for output in outputs
        for one in output.outputs
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 40},
        {"max_tokens": 3},
        {"max_tokens": 40, "stop": [" ", "a"], "min_tokens": 9},
        {"max_tokens": 40, "stop": ["e"], "include_stop_str_in_output": True},
        {"max_tokens": 24, "logprobs": 2, "stop": ["z", "th"]},
        {"max_tokens": 24, "temperature": 0.7, "n": 3, "seed": 5, "logprobs": 0},
    ],
    ids=str,
)
def test_texts_ends_and_log_probabilities_are_those_without(pair: tuple[LLM, LLM], options: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 0.0, **options})
    plain, drafting = (llm.generate(TEXTS, params, use_tqdm=False) for llm in pair)
    assert _shown(drafting) == _shown(plain)
    for before, after in zip(plain, drafting, strict=True):
        for one, other in zip(before.outputs, after.outputs, strict=True):
            assert other.cumulative_logprob == pytest.approx(one.cumulative_logprob, abs=0.05)


def test_counts_are_in_the_metrics(pair: tuple[LLM, LLM]) -> None:
    plain, drafting = (
        {metric.name: float(getattr(metric, "value", 0)) for metric in llm.get_metrics()} for llm in pair
    )
    assert plain["nanoflow:spec_decode_num_drafts"] == 0
    tokens, right = (drafting[f"nanoflow:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    assert 0 < right < tokens
    assert drafting["nanoflow:generation_tokens"] >= right


def test_a_server_says_how_many_guesses_were_right() -> None:
    with running_server(["default", "--speculative", "ngram:4:3:1", "--max-num-seqs", "4"]) as server:
        body = {"prompt": "a b c d e f " * 6, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.root_url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 60
        with urllib.request.urlopen(f"{server.root_url}/metrics") as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    seen = {line.split("{")[0]: float(line.split()[-1]) for line in lines}
    right = seen["nanoflow:spec_decode_num_accepted_tokens_total"]
    assert 0 < right <= seen["nanoflow:spec_decode_num_draft_tokens_total"]
    assert seen["nanoflow:generation_tokens_total"] == 60
