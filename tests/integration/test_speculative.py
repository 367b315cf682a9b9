"""Speculative decoding, end to end on a CPU: whatever is asked for, the answers are those of an engine without it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine, resolve_model
from nanoflow.engine.engine import Engine
from nanoflow.engine.llm import LLM
from nanoflow.engine.messages import EngineStats
from nanoflow.models.registry import build_graph
from nanoflow.outputs import RequestOutput
from nanoflow.plan.book import PlanEntry, StoredBook
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.gain import Gain
from tests.all_cases import covering, part
from tests.driving import Prompt, Run, expect_less, greedy, run_engine
from tests.toy_models import ENGINE_OPTIONS, VOCAB_SIZE, write_toy_model

NGRAM = "ngram:4:3:1"
SMALL = tuple(range(20, 23))


@pytest.fixture(autouse=True)
def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy model takes no time, so that drafts would not pay."""
    monkeypatch.setattr(Gain, "allows", lambda *_: True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"))


def repetitive_prompts(count: int, seed: int = 0) -> list[Prompt]:
    rng = random.Random(seed)
    words = [[rng.randrange(4, VOCAB_SIZE) for _ in range(rng.randint(2, 6))] for _ in range(4)]
    return [list(itertools.chain(*(rng.choice(words) for _ in range(rng.randint(1, 9))))) for _ in range(count)]


def run(
    model: Path, prompts: list[Prompt], params: SamplingParams, *, is_tight: bool = False, seed: int = 0, **options: Any
) -> tuple[Run, EngineStats]:
    engine = build_engine(EngineConfig(model=str(model), **{**ENGINE_OPTIONS, "max_num_seqs": 8, **options}))
    try:
        if is_tight:
            expect_less(engine, 10)
        return run_engine(engine, prompts, params, seed=seed), engine.stats()
    finally:
        engine.close()


@pytest.mark.parametrize(("is_async", "num_pages"), covering([False, True], [None, 24]))
def test_greedy_answers_are_the_same(model: Path, is_async: bool, num_pages: int | None) -> None:
    prompts = repetitive_prompts(24)
    options: dict[str, Any] = {
        "async_scheduling": is_async,
        "num_pages": num_pages,
        "max_model_len": 160,
        "is_tight": bool(num_pages),
    }
    params = greedy(60, logprobs=2)
    plain, _ = run(model, prompts, params, **options)
    drafted, stats = run(model, prompts, params, speculative=NGRAM, **options)
    assert drafted.tokens == plain.tokens and drafted.top_tokens == plain.top_tokens
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 100
    assert bool(num_pages) == (drafted.num_preemptions > 0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.8, "min_tokens": 10, "stop_token_ids": [21]},
        {"temperature": 1.0, "logit_bias": {20: 1.0}, "stop_token_ids": [22]},
        {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": [20, 21]},
    ],
)
def test_each_seed_draws_the_same_tokens(model: Path, options: dict[str, Any]) -> None:
    """Of three tokens, so that guesses are right now and then."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, allowed_token_ids=list(SMALL), **options)
    prompts = repetitive_prompts(16)
    plain, _ = run(model, prompts, params)
    drafted, stats = run(model, prompts, params, speculative=NGRAM)
    assert drafted.tokens == plain.tokens
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


def test_the_distribution_is_the_same_with_other_seeds(model: Path) -> None:
    """Triples of tokens at the end of a draft's reach, compared by a chi-square test."""
    params = SamplingParams(max_tokens=8, ignore_eos=True, allowed_token_ids=list(SMALL), temperature=1.5)
    prompt = [[5, 20, 21, 20, 21]] * 600
    counts = []
    for speculative, seed in ((None, 0), (NGRAM, 10_000)):
        found, stats = run(model, prompt, params, seed=seed, speculative=speculative, max_num_seqs=16)
        triples = [tuple(tokens[5:]) for tokens in found.tokens]
        counts.append([triples.count(triple) for triple in itertools.product(SMALL, repeat=3)])
    assert stats.num_accepted_tokens > 200
    assert min(map(min, counts)) > 5
    assert chi2_contingency(np.array(counts)).pvalue > 0.001


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.7}]
)
def test_penalties_are_kept_to(model: Path, options: dict[str, Any]) -> None:
    prompts, params = repetitive_prompts(6), greedy(30, **options)
    plain, _ = run(model, prompts, params)
    drafted, stats = run(model, prompts, params, speculative=NGRAM)
    assert drafted.tokens == plain.tokens
    assert stats.num_drafts == 0 and stats.num_undrafted_requests == len(prompts)


def test_nano_batched_plans_run_drafts(model: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(model), **ENGINE_OPTIONS)
    graph = build_graph(resolve_model(config)[0], None)
    plan = nanobatch_plan(graph, 64, [3, 9], "cut")
    path = tmp_path / "book.json"
    path.write_bytes(StoredBook(entries=(PlanEntry(plan=plan, min_tokens=2, max_tokens=64),)).to_json())
    prompts, params = repetitive_prompts(12), greedy(40)
    plain, _ = run(model, prompts, params, max_batch_tokens=64)
    drafted, stats = run(model, prompts, params, max_batch_tokens=64, plan=str(path), speculative=NGRAM)
    assert drafted.tokens == plain.tokens and stats.num_accepted_tokens > 100


def test_an_engine_for_one_request_has_room_for_its_draft(model: Path) -> None:
    prompts, params = repetitive_prompts(3), greedy(40)
    plain, _ = run(model, prompts, params, max_num_seqs=1)
    drafted, stats = run(model, prompts, params, max_num_seqs=1, speculative="ngram:32:1:1")
    assert drafted.tokens == plain.tokens and stats.num_accepted_tokens > 0 and stats.iteration < 3 * 40


def test_requests_that_leave_amid_drafts_disturb_nobody(model: Path) -> None:
    prompts, params = repetitive_prompts(12), greedy(40)
    plain, _ = run(model, prompts, params)
    engine = build_engine(EngineConfig(model=str(model), **{**ENGINE_OPTIONS, "speculative": NGRAM}))
    try:
        got = step_with_aborts(engine, prompts, params, aborts={3: 1, 5: 4, 9: 7})
        assert engine.stats().pages_in_use == 0 and engine.stats().num_accepted_tokens > 50
    finally:
        engine.close()
    for request_id, tokens in got.items():
        assert tokens == plain.tokens[request_id][: len(tokens)]
        assert len(tokens) == 40 or request_id in (1, 4, 7)


def step_with_aborts(
    engine: Engine, prompts: list[Prompt], params: SamplingParams, aborts: dict[int, int]
) -> dict[int, list[int]]:
    """Tokens of each request, some of which are aborted after a step."""
    for place, prompt in enumerate(prompts):
        request = Request(
            request_id=place,
            prompt_token_ids=prompt,
            params=params,
            seed=place,
            max_tokens=params.max_tokens or 1,
            eos_token_ids=(),
        )
        engine.add(request)
    got: dict[int, list[int]] = {place: [] for place in range(len(prompts))}
    for step in itertools.count():
        if not engine.has_work:
            return got
        output = engine.step()
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            got[request_id].append(token_id)
        if step in aborts:
            engine.abort([aborts[step]])
        engine.check_integrity()
    raise AssertionError


# Text, with the default model.

CODE = "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return a + b\n\ndef add(a, b):\n"


@pytest.fixture(scope="module")
def llms() -> Iterator[tuple[LLM, LLM]]:
    with LLM(max_num_seqs=8) as plain, LLM(max_num_seqs=8, speculative=NGRAM) as drafting:
        yield plain, drafting


def shown(outputs: list[RequestOutput]) -> list[list[dict[str, Any]]]:
    """All of a completion that does not hang on the clock; probabilities up to their last digits."""
    return [
        [
            {
                **{name: getattr(one, name) for name in ("text", "token_ids", "finish_reason", "stop_reason")},
                "places": None if one.logprobs is None else [list(place) for place in one.logprobs],
            }
            for one in output.outputs
        ]
        for output in outputs
    ]


@pytest.mark.parametrize(
    ("options", "max_tokens"),
    covering(
        [
            {},
            {"stop": ["return"]},
            {"stop": ["+ b\n\n"], "include_stop_str_in_output": True},
            {"stop": ["a, b"], "min_tokens": 20},
            {"logprobs": 3, "prompt_logprobs": 1},
            {"temperature": 0.8, "seed": 3, "n": 3},
            {"bad_words": ["return"]},
            {"logprobs": 2, "stop": ["b"]},
        ],
        part([60], of=[1, 3, 60]),
    ),
)
def test_texts_are_the_same(llms: tuple[LLM, LLM], options: dict[str, Any], max_tokens: int) -> None:
    options = {"temperature": 0.0, **options, "min_tokens": min(options.get("min_tokens", 0), max_tokens)}
    params = SamplingParams(max_tokens=max_tokens, **options)
    prompts = [CODE, CODE * 2, "x = 1\n" * 9]
    plain, drafted = (llm.generate(prompts, params, use_tqdm=False) for llm in llms)
    assert shown(drafted) == shown(plain)
    for ours, theirs in zip(drafted, plain, strict=True):
        sums = [[one.cumulative_logprob for one in output.outputs] for output in (ours, theirs)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-3) if sums[1][0] is not None else sums[0] == sums[1]


def test_metrics_tell_what_came_of_drafts(llms: tuple[LLM, LLM]) -> None:
    llms[1].generate(CODE, SamplingParams(temperature=0.0, max_tokens=60), use_tqdm=False)
    for llm, is_drafting in zip(llms, (False, True), strict=True):
        values = {metric.name.removeprefix("nanoflow:"): metric.value for metric in llm.get_metrics()}
        names = ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens")
        assert (0 < values[names[0]] <= values[names[2]]) == (values[names[1]] > 0) == is_drafting
