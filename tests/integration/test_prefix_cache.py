"""Prefixes that are in the KV cache already, end to end on a CPU: answers are those of an engine without a cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanoflow.engine.llm import LLM
from nanoflow.outputs import RequestOutput
from nanoflow.request import RequestError, SamplingParams
from tests.driving import Prompt, expect_less
from tests.families import make_model
from tests.toy_models import ENGINE_OPTIONS, VOCAB_SIZE, write_toy_model

PAGE_SIZE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with closing(open_llm(model)) as llm:
        yield llm


def open_llm(model: Path, **options: Any) -> LLM:
    return LLM(str(model), **{**ENGINE_OPTIONS, "max_num_seqs": 8, **options})


def tokens(count: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Prompt:
    rng = random.Random(seed)
    return [rng.randrange(4, vocab_size) for _ in range(count)]


def sampled(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=5, max_tokens=max_tokens, ignore_eos=True, **options)


def generate(llm: LLM, prompts: Sequence[Any], params: SamplingParams) -> list[RequestOutput]:
    outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
    llm._engine.check_integrity()
    return outputs


def answers(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def counted(llm: LLM, name: str) -> float:
    return next(metric.value for metric in llm.get_metrics() if metric.name.endswith(name))


def test_the_second_time_all_but_the_last_page_is_there(llm: LLM) -> None:
    prompt = tokens(5 * PAGE_SIZE + 3, 1)
    first, second = (generate(llm, [prompt], sampled(4))[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 5 * PAGE_SIZE)
    assert answers([first]) == answers([second])
    assert counted(llm, "prefix_cache_queries") == 2 * len(prompt)
    assert counted(llm, "prefix_cache_hits") == 5 * PAGE_SIZE
    # At least one token is computed: its logits are those that the first token is drawn from.
    assert generate(llm, [prompt[: 5 * PAGE_SIZE]], sampled(1))[0].num_cached_tokens == 4 * PAGE_SIZE


def test_the_next_turn_of_a_conversation_finds_the_answer_too(llm: LLM) -> None:
    prompt = tokens(2 * PAGE_SIZE, 2)
    answer = generate(llm, [prompt], sampled(2 * PAGE_SIZE))[0].outputs[0].token_ids
    output = generate(llm, [[*prompt, *answer, *tokens(5, 3)]], sampled(1))[0]
    # The last token of an answer is drawn and never computed.
    assert output.num_cached_tokens == 3 * PAGE_SIZE


def test_completions_of_a_prompt_compute_it_once(llm: LLM) -> None:
    prompt = tokens(10 * PAGE_SIZE, 4)
    output = generate(llm, [prompt], sampled(6, n=6))[0]
    assert output.num_cached_tokens == 0
    assert counted(llm, "prefix_cache_hits") == 5 * 9 * PAGE_SIZE
    alone = [
        generate(llm, [prompt], SamplingParams(temperature=0.8, seed=5 + i, max_tokens=6, ignore_eos=True))[0]
        for i in range(6)
    ]
    assert [completion.token_ids for completion in output.outputs] == [one.outputs[0].token_ids for one in alone]


def test_salts_keep_prompts_apart(llm: LLM) -> None:
    prompt = tokens(3 * PAGE_SIZE, 5)
    found = [
        generate(llm, [given], sampled(1))[0].num_cached_tokens
        for given in (
            prompt,
            {"prompt_token_ids": prompt, "cache_salt": "a"},
            {"prompt_token_ids": prompt, "cache_salt": "b"},
            {"prompt_token_ids": prompt, "cache_salt": "a"},
            {"prompt_token_ids": prompt, "cache_salt": None},
        )
    ]
    assert found == [0, 0, 0, 2 * PAGE_SIZE, 2 * PAGE_SIZE]
    for wrong in ("", 5):
        with pytest.raises(RequestError, match="cache_salt is a string that is not empty"):
            generate(llm, [{"prompt_token_ids": prompt, "cache_salt": wrong}], sampled(1))


def test_what_was_forgotten_is_computed_again(llm: LLM) -> None:
    prompt = tokens(3 * PAGE_SIZE, 6)
    generate(llm, [prompt], sampled(1))
    assert llm.reset_prefix_cache() is True
    assert generate(llm, [prompt], sampled(1))[0].num_cached_tokens == 0


def test_without_the_cache_nothing_is_found(model: Path) -> None:
    with closing(open_llm(model, enable_prefix_caching=False)) as llm:
        prompt = tokens(3 * PAGE_SIZE, 7)
        assert [generate(llm, [prompt], sampled(1))[0].num_cached_tokens for _ in range(2)] == [0, 0]
        assert counted(llm, "prefix_cache_queries") == 0


def test_prompts_are_scored_in_full(llm: LLM) -> None:
    """Log probabilities of a prompt need all of its tokens computed."""
    prompt = tokens(4 * PAGE_SIZE, 8)
    before, after = generate(llm, [prompt], sampled(2, prompt_logprobs=1)), None
    generate(llm, [prompt], sampled(2))
    after = generate(llm, [prompt], sampled(2, prompt_logprobs=1, n=2))
    first, second = before[0].prompt_logprobs, after[0].prompt_logprobs
    assert first is not None and second is not None and len(first) == len(second) == len(prompt)
    for one, other in zip(list(first)[1:], list(second)[1:], strict=True):
        assert one is not None and other is not None and one.keys() == other.keys()
        for token_id in one:
            assert one[token_id].logprob == pytest.approx(other[token_id].logprob, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"speculative": "ngram:3:3:1"}], ids=str)
def test_conversations_in_a_small_cache_get_the_same_tokens(model: Path, options: dict[str, Any]) -> None:
    """Turns of conversations with common beginnings, in so few pages that some are evicted and requests preempted."""
    system = [tokens(count, 20 + count) for count in (0, 40, 100)]
    given = {"num_pages": 36, "max_batch_tokens": 96, "max_model_len": 256, **options}
    said: dict[bool, list[Any]] = {}
    for has_cache in (False, True):
        with closing(open_llm(model, enable_prefix_caching=has_cache, **given)) as llm:
            expect_less(llm._engine, 10)
            talks = [[*system[i % 3], *tokens(9, 40 + i)] for i in range(9)]
            rounds = []
            for turn in range(3):
                outputs = generate(llm, talks, sampled(20, logprobs=0))
                rounds.append(answers(outputs))
                talks = [
                    [*talk, *output.outputs[0].token_ids, *tokens(3, 60 + turn)]
                    for talk, output in zip(talks, outputs, strict=True)
                ]
            said[has_cache] = rounds
            stats = llm._engine.stats()
            assert stats.pages_in_use == 0 and stats.num_preemptions > 0
            assert (stats.prefix_cache_hits > 0) is has_cache
    assert said[True] == said[False]


def test_layers_with_a_sliding_window_have_a_cache_too(tmp_path: Path) -> None:
    folder = make_model("gemma3", tmp_path, seed=1)
    with closing(open_llm(folder, skip_tokenizer_init=True)) as llm:
        prompt = tokens(90, 9, vocab_size=100)
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
        first, second = (generate(llm, [prompt], params)[0] for _ in range(2))
        assert first.num_cached_tokens == 0 and second.num_cached_tokens == 80
        assert answers([first]) == answers([second])
