"""Every family on a GPU, with all its kernels and CUDA graphs, gives the tokens that it gives on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.request import Request, SamplingParams
from tests.driving import greedy, random_prompts, run_model
from tests.families import FAMILIES, make_model

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
MAX_TOKENS = 16
PROMPTS = random_prompts(32, 131, longest=90)
# No more rows than prompts: CUDA graphs of larger batches would be captured for nothing.
ON_GPU: dict[str, Any] = {"device": "cuda", "max_num_seqs": len(PROMPTS)}
ON_CPU: dict[str, Any] = {**ON_GPU, "device": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on disk, and what it generates on a CPU."""

    folder: Path
    expected: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = make_model(request.param, tmp_path_factory.mktemp(request.param), seed=1)
    yield Case(folder=folder, expected=run_model(folder, PROMPTS, greedy(MAX_TOKENS), **ON_CPU).tokens)


@pytest.mark.parametrize(("max_batch_tokens", "is_async"), [(64, True), (512, False)])
def test_greedy_tokens(case: Case, max_batch_tokens: int, is_async: bool) -> None:
    assert len({tuple(tokens) for tokens in case.expected}) > 16, "the model must have something to say"
    run = run_model(
        case.folder,
        PROMPTS,
        greedy(MAX_TOKENS),
        **ON_GPU,
        max_batch_tokens=max_batch_tokens,
        async_scheduling=is_async,
    )
    assert run.tokens == case.expected


def test_greedy_tokens_under_a_nano_batched_plan(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(nanobatch_plan(build_graph(load(case.folder), None), 64, [13, 40]).to_json())
    run = run_model(case.folder, PROMPTS, greedy(MAX_TOKENS), **ON_GPU, max_batch_tokens=64, plan=str(path))
    assert run.tokens == case.expected


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_tokens_differ_only_where_they_nearly_tie(name: str, tmp_path: Path) -> None:
    """At the first differing token, each side's token is among the other's five most probable."""
    folder = make_model(name, tmp_path, seed=1, dtype="bfloat16", std=0.12)
    params = greedy(MAX_TOKENS, logprobs=5)
    ours, theirs = (run_model(folder, PROMPTS, params, dtype="bfloat16", **device) for device in (ON_GPU, ON_CPU))
    num_equal = 0
    for our_tokens, our_top, their_tokens, their_top in zip(
        ours.tokens, ours.top_tokens, theirs.tokens, theirs.top_tokens, strict=True
    ):
        pairs = enumerate(zip(our_tokens, their_tokens, strict=True))
        place = next((i for i, pair in pairs if pair[0] != pair[1]), None)
        if place is None:
            num_equal += 1
            continue
        assert our_tokens[place] in their_top[place]
        assert their_tokens[place] in our_top[place]
    assert num_equal >= len(PROMPTS) // 4


@dataclass(slots=True, kw_only=True)
class Drawn:
    """What came back for one request: tokens, and log probabilities at its places and at those of its prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    prompt_logprobs: dict[int, list[float]] = field(default_factory=dict)


def _sampled(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": MAX_TOKENS, "ignore_eos": True, **options})


SAMPLED = [
    _sampled(),
    _sampled(temperature=1.4, logprobs=3),
    _sampled(top_k=7),
    _sampled(top_p=0.6, logprobs=0),
    _sampled(min_p=0.2),
    _sampled(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, logprobs=5),
    _sampled(temperature=0.8, presence_penalty=1.0, frequency_penalty=0.5),
    _sampled(repetition_penalty=1.5, prompt_logprobs=2),
    _sampled(temperature=0.0, repetition_penalty=0.8, frequency_penalty=1.0),
    _sampled(temperature=0.0, logprobs=2, prompt_logprobs=0),
    _sampled(logit_bias={5: 3.0, 9: -100.0}),
    _sampled(min_tokens=8, ignore_eos=False, stop_token_ids=range(20, 60)),
]


def _draw(folder: Path, **options: Any) -> list[Drawn]:
    """Every prompt with one of the parameters and a seed of its own."""
    engine = build_engine(EngineConfig(model=str(folder), dtype="float32", **options))
    for place, prompt in enumerate(PROMPTS):
        params = SAMPLED[place % len(SAMPLED)]
        engine.add(Request(request_id=place, prompt_token_ids=prompt, params=params, seed=place, max_tokens=MAX_TOKENS))
    drawn = [Drawn() for _ in PROMPTS]
    try:
        while engine.has_work:
            output = engine.step()
            for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
                drawn[request_id].token_ids.append(token_id)
            for request_id, places in output.logprobs.items():
                drawn[request_id].logprobs += places.logprobs
            for request_id, places in output.prompt_logprobs.items():
                drawn[request_id].prompt_logprobs.update(enumerate(places.logprobs, start=places.first_position))
    finally:
        engine.close()
    return drawn


def test_same_seed_same_tokens_as_on_a_cpu(tmp_path: Path) -> None:
    folder = make_model("llama3", tmp_path, seed=2)
    expected = _draw(folder, **ON_CPU)
    assert len({tuple(drawn.token_ids) for drawn in expected}) == len(PROMPTS)
    for options in ({"max_batch_tokens": 64}, {"max_batch_tokens": 512, "async_scheduling": False}):
        for ours, theirs in zip(_draw(folder, **ON_GPU, **options), expected, strict=True):
            assert ours.token_ids == theirs.token_ids
            _assert_close(ours.logprobs, theirs.logprobs)
            assert ours.prompt_logprobs.keys() == theirs.prompt_logprobs.keys()
            for position, logprobs in ours.prompt_logprobs.items():
                _assert_close([logprobs], [theirs.prompt_logprobs[position]])


def _assert_close(ours: list[list[float]], theirs: list[list[float]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
