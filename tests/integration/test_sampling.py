"""Sampling through the whole engine: parameters of one request do what they say and leave the others alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.engine.messages import PlaceLogprobs
from nanoflow.outputs import FinishReason
from nanoflow.request import Request, SamplingParams
from tests.driving import HuggingFace, expect_less, random_prompts
from tests.families import EOS_TOKEN_ID, make_model

PROMPTS = random_prompts(12, 131, longest=40, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama3", tmp_path_factory.mktemp("model"), seed=2)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = build_engine(EngineConfig(model=str(folder), max_num_seqs=16, max_batch_tokens=32))
    yield engine
    engine.close()


class Result:
    """What came back for one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[PlaceLogprobs] = []
        self.prompt_logprobs: dict[int, tuple[list[int], list[float]]] = {}
        self.reason: FinishReason | None = None
        self.stop_token_id: int | None = None


Words = tuple[tuple[int, ...], ...]


def _run(
    engine: Engine, requests: list[tuple[list[int], SamplingParams]], seed: int = 0, words: Sequence[Words] = ()
) -> list[Result]:
    for place, (prompt, params) in enumerate(requests):
        engine.add(
            Request(
                request_id=place,
                prompt_token_ids=prompt,
                params=params,
                seed=seed if params.seed is None else params.seed,
                max_tokens=params.max_tokens or 16,
                eos_token_ids=() if params.ignore_eos else engine.facts.eos_token_ids,
                bad_word_ids=words[place] if words else (),
            )
        )
    results = [Result() for _ in requests]
    while engine.has_work:
        output = engine.step()
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            results[request_id].token_ids.append(token_id)
        for request_id, places in output.logprobs.items():
            results[request_id].logprobs.append(places)
        for request_id, places in output.prompt_logprobs.items():
            rows = zip(places.token_ids, places.logprobs, strict=True)
            for position, row in enumerate(rows, start=places.first_position):
                results[request_id].prompt_logprobs[position] = row
        for request_id, finished in output.finished.items():
            results[request_id].reason, results[request_id].stop_token_id = finished.reason, finished.stop_token_id
    engine.check_integrity()
    return results


def _params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **options})


MIXED = [
    _params(temperature=0.9, seed=11),
    _params(temperature=1.3, top_k=7, seed=12, logprobs=2),
    _params(temperature=1.0, top_p=0.6, seed=13),
    _params(temperature=1.0, min_p=0.2, seed=14),
    _params(),
    _params(repetition_penalty=1.5),
    _params(temperature=0.8, presence_penalty=1.0, frequency_penalty=0.5, seed=15),
    _params(logit_bias={5: 100.0}),
    _params(temperature=1.0, seed=16, min_tokens=8, ignore_eos=False, stop_token_ids=list(range(20, 60))),
    _params(prompt_logprobs=1),
    _params(temperature=0.7, repetition_penalty=0.8, seed=17, prompt_logprobs=0),
    _params(temperature=2.0, seed=18, logprobs=0),
]


def test_same_seed_same_tokens_whatever_else_is_in_the_batch(engine: Engine) -> None:
    requests = list(zip(PROMPTS, MIXED, strict=True))
    together = [result.token_ids for result in _run(engine, requests)]
    alone = [_run(engine, [request])[0].token_ids for request in requests]
    backwards = [result.token_ids for result in _run(engine, requests[::-1])][::-1]
    assert together == alone == backwards
    other = [_run(engine, [(prompt, _params(temperature=0.9, seed=99))])[0].token_ids for prompt in PROMPTS[:1]]
    assert other[0] != together[0]


def test_preempted_requests_draw_the_same_tokens_again(folder: Path, engine: Engine) -> None:
    """With penalties and seeds: what a row remembers is made anew when its request comes back."""
    requests = [(prompt, _params(max_tokens=30, temperature=1.0, seed=i, frequency_penalty=0.7, ignore_eos=False))
                for i, prompt in enumerate(PROMPTS)]  # fmt: skip
    expected = [result.token_ids for result in _run(engine, requests)]
    tight = build_engine(
        EngineConfig(
            model=str(folder), max_num_seqs=16, max_batch_tokens=32, page_size=4, num_pages=28, max_model_len=80
        )
    )
    try:
        expect_less(tight, 30)
        result = [result.token_ids for result in _run(tight, requests)]
        assert tight.stats().num_preemptions > 0
    finally:
        tight.close()
    assert result == expected


def test_greedy_repetition_penalty_is_that_of_transformers(folder: Path, engine: Engine) -> None:
    reference = HuggingFace(folder)
    requests = [(prompt, _params(repetition_penalty=1.3)) for prompt in PROMPTS]
    for prompt, result in zip(PROMPTS, _run(engine, requests), strict=True):
        expected = reference.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.3, pad_token_id=0
        )
        assert result.token_ids == expected[0, len(prompt) :].tolist()


def test_logit_bias_forces_and_forbids(engine: Engine) -> None:
    free, forced = _run(engine, [(PROMPTS[0], _params()), (PROMPTS[0], _params(logit_bias={77: 100.0}))])
    assert forced.token_ids == [77] * 12
    banned = free.token_ids[0]
    (other,) = _run(engine, [(PROMPTS[0], _params(logit_bias={banned: -100.0}))])
    assert banned not in other.token_ids


def test_only_allowed_tokens_are_chosen(engine: Engine) -> None:
    allowed = [3, 50, 51, 52, 130]
    free = _params(temperature=1.5, seed=4, max_tokens=40)
    few = _params(temperature=1.5, seed=4, max_tokens=40, allowed_token_ids=allowed, frequency_penalty=0.3)
    all_of_them = _params(temperature=1.5, seed=4, max_tokens=40, allowed_token_ids=range(131))
    one, other, third = _run(engine, [(PROMPTS[0], free), (PROMPTS[0], few), (PROMPTS[0], all_of_them)])
    assert set(other.token_ids) == set(allowed)
    assert one.token_ids == third.token_ids


def test_no_bad_word_is_completed_and_all_else_is_as_it_was(folder: Path, engine: Engine) -> None:
    """With batches on their way whose tokens the host has not seen, after preemptions, and greedy as reference."""
    options: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.2}] * 4
    requests = [(prompt, _params(max_tokens=30, **more)) for prompt, more in zip(PROMPTS, options, strict=True)]
    words = [_words_of(result.token_ids) for result in _run(engine, requests)]
    expected = [result.token_ids for result in _run(engine, requests, words=words)]
    for token_ids, forbidden in zip(expected, words, strict=True):
        assert not any(_occurs(word, token_ids) for word in forbidden)
    # The first token that is forbidden is the first that differs.
    free = [result.token_ids for result in _run(engine, requests)]
    for place, (token_ids, forbidden) in enumerate(zip(free, words, strict=True)):
        first = min(
            end for word in forbidden for end in range(len(word), 31) if token_ids[end - len(word) : end] == [*word]
        )
        assert (
            expected[place][: first - 1] == token_ids[: first - 1]
            and expected[place][first - 1] != token_ids[first - 1]
        )
    tight = build_engine(
        EngineConfig(
            model=str(folder), max_num_seqs=16, max_batch_tokens=32, page_size=4, num_pages=28, max_model_len=80
        )
    )
    try:
        expect_less(tight, 30)
        result = [result.token_ids for result in _run(tight, requests, words=words)]
        assert tight.stats().num_preemptions > 0
    finally:
        tight.close()
    assert result == expected


def _words_of(token_ids: list[int]) -> Words:
    """Some of what was generated: two tokens, three, and one that stands alone."""
    return (tuple(token_ids[4:6]), tuple(token_ids[9:12]), (token_ids[20],), (1, 2, 3, 4, 5))


def _occurs(word: tuple[int, ...], token_ids: list[int]) -> bool:
    return any(tuple(token_ids[first : first + len(word)]) == word for first in range(len(token_ids)))


def test_stop_token_ends_and_is_reported(engine: Engine) -> None:
    (free,) = _run(engine, [(PROMPTS[1], _params())])
    stop = free.token_ids[5]
    first = free.token_ids.index(stop)
    (result,) = _run(engine, [(PROMPTS[1], _params(stop_token_ids=[stop]))])
    assert result.token_ids == free.token_ids[: first + 1]
    assert (result.reason, result.stop_token_id) == (FinishReason.STOP, stop)
    assert free.reason is FinishReason.LENGTH


def test_end_of_sequence_waits_for_min_tokens(engine: Engine) -> None:
    """A bias makes the end of sequence the favourite at every step."""
    bias = {EOS_TOKEN_ID: 100.0}
    now, later, never = _run(
        engine,
        [
            (PROMPTS[2], _params(logit_bias=bias, ignore_eos=False)),
            (PROMPTS[2], _params(logit_bias=bias, ignore_eos=False, min_tokens=5)),
            (PROMPTS[2], _params(logit_bias=bias)),
        ],
    )
    assert (now.token_ids, now.reason, now.stop_token_id) == ([EOS_TOKEN_ID], FinishReason.STOP, None)
    assert len(later.token_ids) == 6 and later.token_ids[-1] == EOS_TOKEN_ID
    assert EOS_TOKEN_ID not in later.token_ids[:5]
    assert (never.token_ids, never.reason) == ([EOS_TOKEN_ID] * 12, FinishReason.LENGTH)


def test_logprobs_are_those_of_the_model(folder: Path, engine: Engine) -> None:
    """Before penalties and temperature, for greedy and for drawn tokens."""
    reference = HuggingFace(folder)
    params = [_params(logprobs=3), _params(logprobs=0, temperature=1.5, seed=3), _params(logprobs=2, min_tokens=3)]
    for result in _run(engine, [(PROMPTS[3], p) for p in params]):
        tokens = PROMPTS[3] + result.token_ids
        expected = torch.log_softmax(reference.logits(tokens[:-1])[len(PROMPTS[3]) - 1 :], -1)
        assert len(result.logprobs) == len(result.token_ids)
        for place, (token_id, places) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
            assert places.token_ids[0][0] == token_id
            np.testing.assert_allclose(places.logprobs[0], expected[place, places.token_ids[0]], atol=2e-4)
            assert places.ranks[0] == int((expected[place] > expected[place, token_id]).sum()) + 1


def test_prompt_logprobs_over_several_chunks(folder: Path, engine: Engine) -> None:
    """The token budget is 32, the prompt longer, and others run beside it."""
    prompt = random_prompts(1, 131, longest=1, seed=8)[0] + [t for p in PROMPTS for t in p][:100]
    expected = torch.log_softmax(HuggingFace(folder).logits(prompt), -1)
    results = _run(engine, [(PROMPTS[0], _params()), (prompt, _params(prompt_logprobs=2)), (PROMPTS[1], _params())])
    scores = results[1].prompt_logprobs
    assert sorted(scores) == list(range(1, len(prompt)))
    for position, (token_ids, logprobs) in scores.items():
        assert token_ids[0] == prompt[position] and len(token_ids) == 3
        np.testing.assert_allclose(logprobs, expected[position - 1, token_ids], atol=2e-4)
    assert not results[0].prompt_logprobs


def test_parameters_at_the_ends_of_their_ranges_sample_something(engine: Engine) -> None:
    """Whatever `SamplingParams` lets pass gives finite logits and a token."""
    ends = [
        _params(repetition_penalty=0.01, temperature=1e-4),
        _params(repetition_penalty=100.0, temperature=100.0),
        _params(temperature=5e-324),
        _params(temperature=1.0, top_p=5e-324),
        _params(temperature=1.0, min_p=1.0, top_k=2**31),
        _params(presence_penalty=-2.0, frequency_penalty=2.0, temperature=2e-5),
        _params(logit_bias=dict.fromkeys(range(131), -100.0), temperature=1.0),
        _params(logit_bias={5: 100.0, 6: 100.0}, temperature=1e-4),
    ]
    results = _run(engine, [(PROMPTS[0], params) for params in ends])
    assert [(len(result.token_ids), result.reason) for result in results] == [(12, FinishReason.LENGTH)] * len(ends)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_their_request_alone(folder: Path, tmp_path: Path, value: float) -> None:
    check_that_spoilt_requests_end_alone(folder, tmp_path, value, "cpu")


def check_that_spoilt_requests_end_alone(folder: Path, tmp_path: Path, value: float, device: str) -> None:
    """One token's embedding is not finite: whoever has it in the prompt fails, and others may have its pages later."""
    bad = 130
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][bad] = value
    save_file(weights, path, metadata={"format": "pt"})
    prompts = [[token for token in prompt if token != bad] for prompt in PROMPTS]
    # The bad token is never drawn.
    clean = [
        (prompt, _params(logit_bias={bad: -100.0}, temperature=i % 2 / 2, seed=i)) for i, prompt in enumerate(prompts)
    ]
    spoilt = [
        ([1, bad, 5], _params()),
        ([1, bad, 5], _params(temperature=1.0, top_p=0.9)),
        ([bad], _params(temperature=1.0, repetition_penalty=1.2, logprobs=3)),
        ([3, 4, bad], _params(temperature=1.0, top_k=3, prompt_logprobs=2)),
    ]
    engine = build_engine(
        EngineConfig(model=str(tmp_path / "model"), device=device, max_num_seqs=16, max_batch_tokens=32, num_pages=64)
    )
    try:
        expected = [result.token_ids for result in _run(engine, clean)]
        for _ in range(2):
            results = _run(engine, [request for pair in zip(clean, spoilt, strict=False) for request in pair])
            assert [result.reason for result in results[1::2]] == [FinishReason.ERROR] * len(spoilt)
            assert [result.token_ids for result in results[::2]] == expected[: len(spoilt)]
            assert [result.token_ids for result in _run(engine, clean)] == expected
    finally:
        engine.close()
