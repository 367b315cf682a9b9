"""`SamplingParams` as users of vLLM write them: changed, cloned, positional, and with what there is not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import msgspec
import pytest

from nanoflow import RequestOutputKind, SamplingParams
from nanoflow.engine.messages import EngineFacts
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import Prompt
from nanoflow.request import RequestError
from nanoflow.structured import Structured

FACTS = EngineFacts(
    model_type="toy",
    vocab_size=100,
    hidden_size=8,
    max_model_len=64,
    eos_token_ids=(0,),
    num_pages=64,
    page_size=4,
    max_batch_tokens=64,
    max_num_seqs=8,
    device="cpu",
    dtype="float32",
    plan="sequential",
    load_s=0.0,
    warm_up_s=0.0,
)

# Forms that people write, and what they give.
TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.8, "top_p": 0.95}, {"temperature": 0.8, "top_p": 0.95}),
    ({"n": 2, "best_of": 2}, {"n": 2}),
    ({"best_of": 1}, {}),
    ({"best_of": None}, {}),
    ({"use_beam_search": False}, {}),
    ({"early_stopping": False, "length_penalty": 1.0}, {}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"logprobs": -1}, {"logprobs": -1}),
    ({"prompt_logprobs": 0}, {"prompt_logprobs": 0}),
    ({"bad_words": ["a"]}, {"bad_words": ["a"]}),
    ({"allowed_token_ids": [1, 2]}, {"allowed_token_ids": [1, 2]}),
    ({"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": 5}),
    ({"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": -1}),
    ({"output_kind": RequestOutputKind.DELTA}, {"output_kind": RequestOutputKind.DELTA}),
    ({"stop": "x"}, {"stop": ["x"]}),
    ({"stop": None, "stop_token_ids": None}, {}),
    ({"logits_processors": None}, {}),
    ({"guided_decoding": None, "structured_outputs": None}, {}),
    ({"guided_decoding": {"regex": "a"}}, {"structured_outputs": Structured(kind="regex", text="a")}),
    ({"spaces_between_special_tokens": True}, {}),
    ({"extra_args": None}, {}),
    ({"extra_args": {}}, {}),
    ({"skip_reading_prefix_cache": True}, {}),
    ({"flat_logprobs": False, "skip_clone": False}, {}),
    ({"thinking_token_budget": -1}, {}),
    ({"logprob_token_ids": []}, {}),
    ({"seed": 3, "ignore_eos": True, "max_tokens": None}, {"seed": 3, "ignore_eos": True, "max_tokens": None}),
    ({"detokenize": False, "skip_special_tokens": False}, {"detokenize": False, "skip_special_tokens": False}),
    ({"min_p": 0.1, "logit_bias": {"5": 1}}, {"min_p": 0.1, "logit_bias": {5: 1.0}}),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 2}, "best_of=2 is not possible: all n completions are returned"),
    ({"n": 3, "best_of": 5}, "best_of=5 is not possible"),
    ({"n": 2, "best_of": 1}, "best_of=1 is not possible"),
    ({"use_beam_search": True}, "use_beam_search=True is not possible: there is no beam search"),
    ({"length_penalty": 0.5}, "length_penalty=0.5 is not possible"),
    ({"guided_decoding": ["a"]}, "structured_outputs must be an object with one of json, regex, "),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag.triggers must be a list"),
    ({"logits_processors": [print]}, "there is logit_bias"),
    ({"extra_args": {"a": 1}}, "extra_args="),
    ({"flat_logprobs": True}, "flat_logprobs=True"),
    ({"spaces_between_special_tokens": False}, "as the tokenizer's decoder does"),
    ({"logprob_token_ids": [1]}, "-1 gives all"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be at least 1, or -1"),
    ({"output_kind": 1}, "output_kind must be one of RequestOutputKind.CUMULATIVE, "),
]


def params_of(given: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**given)


@pytest.mark.parametrize(("given", "expected"), TAKEN, ids=str)
def test_forms_that_are_taken(given: dict[str, Any], expected: dict[str, Any]) -> None:
    params = params_of(given)
    assert params == SamplingParams() or expected
    assert all(getattr(params, name) == value for name, value in expected.items())
    assert SamplingParams.from_optional(**given) == params == params.clone() == params.snapshot()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert copy.copy(params) == pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_forms_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as problem:
        params_of(given)
    assert message in str(problem.value) and "\n" not in str(problem.value)


def test_first_parameters_have_the_places_that_they_have_in_vllm() -> None:
    places: tuple[Any, ...] = (2, 0.1, 0.2, 1.3, 0.4, 0.5, 6, 0.7, 8, ["s"], [9], True, 10, 3, 4, 5)
    names = (
        *("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k"),
        *("min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs"),
        "prompt_logprobs",
    )
    assert SamplingParams(*places) == SamplingParams(**dict(zip(names, places, strict=True)))
    with pytest.raises(TypeError, match="got 'n' twice"):
        SamplingParams(1, n=1)  # type: ignore
    with pytest.raises(TypeError, match="takes 16 arguments without a name, got 17"):
        SamplingParams(*places, None)  # type: ignore[call-arg]


def test_they_can_be_changed_and_a_clone_stays_as_it_is() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0})
    clone = params.clone()
    params.temperature, params.max_tokens = 0.0, 4
    params.stop.append("b")  # type: ignore[union-attr]
    params.logit_bias[3] = 1.0  # type: ignore[index]
    assert clone == SamplingParams(stop=["a"], logit_bias={1: 2.0}) and params.is_greedy
    assert params == SamplingParams(stop=["a", "b"], logit_bias={1: 2.0, 3: 1.0}, temperature=0.0, max_tokens=4)
    with pytest.raises(AttributeError, match="no parameter 'tempreature'; did you mean 'temperature'"):
        params.tempreature = 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no parameter 'best_of': all n completions"):
        params.best_of = 1  # type: ignore[attr-defined]


def test_they_are_checked_when_they_are_used_and_kept_as_they_were_then() -> None:
    processor = OutputProcessor(FACTS, None)
    params = SamplingParams(max_tokens=4, detokenize=False, stop_token_ids=[7])
    _, (request,) = processor.add("a", Prompt(text=None, token_ids=[1]), params)
    params.stop_token_ids.append(8)  # type: ignore[union-attr]
    params.temperature = -1.0
    assert request.params.stop_token_ids == [7] and request.params.temperature == 1.0
    with pytest.raises(RequestError, match=r"temperature must be in \[0.0, 100.0\], got -1.0"):
        processor.add("b", Prompt(text=None, token_ids=[1]), params)
    params.temperature, params.n = 0.5, "2"  # type: ignore[assignment]
    with pytest.raises(RequestError, match="n must be an integer"):
        processor.add("b", Prompt(text=None, token_ids=[1]), params)
    assert len(processor) == 1


@pytest.mark.parametrize(
    ("kept", "max_tokens", "expected"), [(3, 4, 3), (60, 4, 50), (-1, 4, 50), (-1, 40, 24), (-1, None, 50)]
)
def test_the_last_tokens_of_a_prompt_are_kept(kept: int, max_tokens: int | None, expected: int) -> None:
    params = SamplingParams(truncate_prompt_tokens=kept, max_tokens=max_tokens, detokenize=False)
    ids = list(range(1, 51))
    output, (request,) = OutputProcessor(FACTS, None).add("a", Prompt(text=None, token_ids=ids), params)
    assert output.prompt_token_ids == request.prompt_token_ids == ids[-expected:]


def test_more_of_a_prompt_than_there_is_room_for_cannot_be_kept() -> None:
    params = SamplingParams(truncate_prompt_tokens=61, max_tokens=4, detokenize=False)
    with pytest.raises(RequestError, match="truncate_prompt_tokens is 61, and there is room for 60 tokens"):
        OutputProcessor(FACTS, None).add("a", Prompt(text=None, token_ids=[1]), params)


def test_where_nobody_wants_text_there_is_none() -> None:
    processor = OutputProcessor(FACTS, None, has_text=False)
    _, (request,) = processor.add("a", Prompt(text=None, token_ids=[1]), SamplingParams(max_tokens=4))
    assert request.params.detokenize is False
    with pytest.raises(RequestError, match="stop strings need detokenize=True"):
        processor.add("b", Prompt(text=None, token_ids=[1]), SamplingParams(stop="x"))
