"""Structured output end to end: what ends by itself has its shape, with everything else that a request may ask for."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from benchmarks.robustness import schemas
from llguidance import LLMatcher

from nanoflow import LLM, RequestError, RequestOutput, SamplingParams, StructuredOutputsParams
from nanoflow.grammars.compiled import Grammars
from nanoflow.outputs import FinishReason
from nanoflow.scheduler.gain import Gain
from nanoflow.structured import Structured
from tests.driving import expect_less

PROMPT = "A record as JSON: "
RECORD = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
    "required": ["id", "kind"],
    "additionalProperties": False,
}
# Ten schemas of growing difficulty, then others of any.
NUMBERS = (*range(0, 32, 4), *range(40, 52))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=24, max_model_len=512) as made:
        yield made


def held(regex: str) -> SamplingParams:
    return SamplingParams(max_tokens=20, seed=0, structured_outputs=StructuredOutputsParams(regex=regex))


def completed(llm: LLM, *structured: Any, prompt: str = PROMPT, **params: Any) -> list[RequestOutput]:
    given = {"max_tokens": 60, "seed": 3, **params}
    return llm.generate(
        [prompt] * len(structured), [SamplingParams(structured_outputs=one, **given) for one in structured]
    )


def test_what_has_ended_validates(llm: LLM) -> None:
    made = [schemas.made_schema(0, number) for number in NUMBERS]
    outputs = completed(llm, *({"json": schema} for schema in made), max_tokens=150, seed=0)
    found = schemas.judged(made, outputs)
    assert found["findings"] == [] and found["num_schemas"] == 20
    assert found["num_of"]["stop"] >= 12, found


def test_other_requests_are_not_affected(llm: LLM) -> None:
    free = llm.generate([PROMPT] * 3, [SamplingParams(max_tokens=30, seed=seed) for seed in range(3)])
    among = llm.generate(
        [PROMPT] * 6,
        [
            SamplingParams(
                max_tokens=30,
                seed=seed // 2,
                structured_outputs=StructuredOutputsParams(regex="[a-z ]{9,}") if seed % 2 else None,
            )
            for seed in range(6)
        ],
    )
    assert [one.outputs[0].token_ids for one in free] == [one.outputs[0].token_ids for one in among[::2]]
    for one in among[1::2]:
        assert re.fullmatch("[a-z ]+", one.outputs[0].text) and one.outputs[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"n": 3},
        {"min_tokens": 40},
        {"logprobs": 2},
        {"frequency_penalty": 1.5, "repetition_penalty": 1.2},
        {"top_k": 5, "top_p": 0.9},
        {"bad_words": ["1", "a"], "logit_bias": {"0": -90.0}},
        {"detokenize": False},
    ],
    ids=str,
)
def test_with_other_parameters(llm: LLM, params: dict[str, Any]) -> None:
    (output,) = completed(llm, {"json": RECORD}, **params)
    for completion in output.outputs:
        assert completion.finish_reason is FinishReason.STOP and completion.stop_reason is None
        text = llm.tokenizer.decode(completion.token_ids)
        assert schemas.problem_of(text, RECORD) is None
        if "bad_words" in params:
            assert json.loads(text)["kind"] == "b"
        if "logprobs" in params:
            assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
    if "n" in params:
        assert len({one.text for one in output.outputs}) > 1


def test_it_is_the_same_again_and_in_any_company(llm: LLM) -> None:
    shape = {"regex": "[a-f]{20}[0-9]{5}"}
    (alone,) = completed(llm, shape)
    for output in completed(llm, *[shape] * 5):
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids
    assert re.fullmatch(shape["regex"], alone.outputs[0].text)


def test_a_stop_string_and_a_length_end_it_before(llm: LLM) -> None:
    (stopped,) = completed(llm, {"regex": "[ab]{5}END[ab]{90}"}, stop=["END"])
    assert re.fullmatch("[ab]{5}", stopped.outputs[0].text) and stopped.outputs[0].stop_reason == "END"
    (cut,) = completed(llm, {"regex": "[ab]{90}"}, max_tokens=3)
    assert cut.outputs[0].finish_reason is FinishReason.LENGTH and len(cut.outputs[0].token_ids) == 3


def test_what_leaves_no_token_fails_alone(llm: LLM) -> None:
    shape = {"choice": ["red", "green"]}
    outputs = llm.generate(
        [PROMPT] * 2,
        [
            SamplingParams(
                structured_outputs=StructuredOutputsParams(**shape), seed=0, allowed_token_ids=[5] if is_bad else None
            )
            for is_bad in (True, False)
        ],
    )
    assert outputs[0].error == "there is no token that may be chosen" and outputs[1].outputs[0].text in shape["choice"]


def test_a_grammar_that_grows_without_end_fails_alone(llm: LLM) -> None:
    rules = "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(20)) + 'A20: "x"\n'
    bad, good = completed(llm, {"grammar": f'start: "y" A0\n{rules}'}, {"choice": ["red"]})
    assert bad.outputs[0].finish_reason is FinishReason.ERROR and "too many expressions" in str(bad.error)
    assert good.outputs[0].text == "red"


def test_a_bad_one_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 1: the regex cannot be used"):
        completed(llm, {"choice": ["red"]}, {"regex": "(a"})


def test_nobody_waits_for_a_grammar_but_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request comes first and its grammar takes long; others come and go meanwhile, also with grammars."""
    is_open = threading.Event()
    compile_one = Grammars._compile

    def compile_slowly(grammars: Grammars, structured: Structured) -> LLMatcher:
        if structured.text == "slow":
            assert is_open.wait(60)
        return compile_one(grammars, structured)

    monkeypatch.setattr(Grammars, "_compile", compile_slowly)
    with LLM(max_num_seqs=4, max_model_len=128) as llm:
        slow, dropped = (llm.add(name, PROMPT, held("slow")) for name in ("slow", "dropped"))
        others = [
            llm.add(f"other {i}", PROMPT, params) for i, params in enumerate((SamplingParams(max_tokens=8), held("ab")))
        ]
        while not all(other.finished for other in others):
            llm.step()
        llm.abort("dropped")
        start_s, num_steps = time.monotonic(), 0
        while time.monotonic() < start_s + 0.3:
            assert llm.step() == []
            num_steps += 1
        assert num_steps < 30, "it sleeps while there is nothing to do"
        assert others[1].outputs[0].text == "ab" and not slow.finished and dropped.finished
        is_open.set()
        while not slow.finished:
            llm.step()
        assert slow.outputs[0].text == "slow"
        llm._engine.check_integrity()


def test_preempted_requests_go_on_where_they_were() -> None:
    """There are pages for half of what these requests may become, so some are sent back and computed again."""
    shape = {"regex": "[a-f]{40}-[0-9]{30}"}
    with LLM(num_pages=14, page_size=16, max_num_seqs=6, max_model_len=112) as small:
        expect_less(small._engine, 8)
        outputs = completed(small, *[shape] * 6, max_tokens=90)
        num_preemptions = next(each for each in small.get_metrics() if "preemption" in each.name)
    assert getattr(num_preemptions, "value", 0) > 0
    texts = {output.outputs[0].text for output in outputs}
    assert len(texts) == 1 and re.fullmatch(shape["regex"], texts.pop())


def test_drafts_change_no_completion_and_forced_tokens_come_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the grammar forces is a draft that is right, also beside other drafts, which may be wrong."""
    monkeypatch.setattr(Gain, "allows", lambda *_: True)
    shapes = (
        {"regex": "(ab){12}"},
        {"json": RECORD},
        {"regex": "[ab]{30}"},
        {"regex": "a, [xy], a long end, [xy]+"},
        None,
    )
    with LLM(speculative="ngram:6:3:1", max_num_seqs=8, max_model_len=256) as guessing:
        for params in ({"temperature": 0.0}, {"logprobs": 1, "min_tokens": 29}):
            drafted, plain = (completed(each, *shapes, max_tokens=30, **params) for each in (guessing, llm))
            for shape, one, other in zip(shapes, drafted, plain, strict=True):
                assert [each.token_ids for each in one.outputs] == [each.token_ids for each in other.outputs], shape
        counts = guessing._engine.stats()
        before = counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens
        # One token is free, all others are forced: in one iteration up to 7 of them.
        (output,) = completed(guessing, {"regex": "[xy] is the beginning of a long text that is forced"}, max_tokens=60)
        counts = guessing._engine.stats()
    num_drafts, num_drafted, num_accepted = (
        after - each
        for after, each in zip(
            (counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens), before, strict=True
        )
    )
    assert output.outputs[0].finish_reason is FinishReason.STOP
    assert num_drafted == num_accepted > len(output.outputs[0].token_ids) * 0.6 and num_drafts > 1
