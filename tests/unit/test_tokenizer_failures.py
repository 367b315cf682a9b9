"""What a tokenizer cannot do is an error of the request that asks for it; one of another model is refused."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanoflow.config import ServerConfig
from nanoflow.engine.llm import LLM
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import read_prompt
from nanoflow.engine.tokenizer import Tokenizer, TokenizerError
from nanoflow.outputs import FinishReason, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.server.app import create_app
from tests.fake_engine import FakeEngine, fake_facts
from tests.local_engine import LocalEngine
from tests.toy_models import ENGINE_OPTIONS, write_toy_model
from tests.toy_tokenizers import byte_level_backend, panicking_backend, toy_tokenizer, write_tokenizer

A, SPACE = 2, 1
TOO_MUCH = "a" * 60 + "b"
# The completion repeats it: its first token is the first that cannot be decoded, with the few before it that matter.
LATE = [SPACE, *[A] * 6]


def panicking() -> Tokenizer:
    return toy_tokenizer(panicking_backend())


def complete(prompts: list[list[int]], **params: Any) -> list[RequestOutput]:
    """The outputs of prompts that run together; the fake engine repeats them."""
    tokenizer = panicking()
    processor, engine = OutputProcessor(fake_facts(), tokenizer), FakeEngine()
    outputs = []
    for name, prompt in enumerate(prompts):
        output, requests = processor.add(str(name), read_prompt(prompt, tokenizer), SamplingParams(**params))
        outputs.append(output)
        for request in requests:
            engine.add(request)
    while engine.has_work:
        for output in processor.process(engine.step()):
            processor.refresh(output)
        engine.abort(processor.take_stopped())
    assert not len(processor) and (not engine.aborted or set(engine.aborted) == {*range(params.get("n", 1))})
    assert engine.aborted or not any(output.error for output in outputs)
    return outputs


@pytest.mark.parametrize("params", [{}, {"stop": ["zzz"]}, {"n": 2}, {"logprobs": 1}])
def test_tokens_that_cannot_become_text_end_their_request_alone(params: dict[str, Any]) -> None:
    bad, good = complete([[A, *LATE], [A]], max_tokens=12, **params)
    assert [completion.finish_reason for completion in bad.outputs] == [FinishReason.ERROR] * len(bad.outputs)
    assert bad.error is not None and bad.error.startswith("the tokenizer cannot decode these tokens: ")
    assert bad.finished and bad.outputs[0].text in ("", "a") and "\n" not in bad.error
    assert good.outputs[0].finish_reason is FinishReason.LENGTH and good.error is None


def test_text_that_nobody_reads_before_the_end_fails_at_the_end() -> None:
    tokenizer = panicking()
    processor, engine = OutputProcessor(fake_facts(), tokenizer), FakeEngine()
    output, requests = processor.add("a", read_prompt(LATE, tokenizer), SamplingParams(max_tokens=4))
    engine.add(requests[0])
    while engine.has_work:
        processor.process(engine.step())
    assert output.finished and output.outputs[0].finish_reason is FinishReason.ERROR and output.error


def test_a_prompt_that_cannot_be_decoded_leaves_nothing_behind() -> None:
    tokenizer = panicking()
    processor = OutputProcessor(fake_facts(), tokenizer)
    for _ in range(2):  # the name is free again
        with pytest.raises(ValueError, match="cannot decode"):
            processor.add("a", read_prompt([SPACE], tokenizer), SamplingParams())
    assert len(processor) == 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": TOO_MUCH}, 400, "cannot encode"),
        ({"prompt": ["a", TOO_MUCH]}, 400, "cannot encode"),
        ({"prompt": [SPACE]}, 400, "cannot decode"),
        ({"prompt": LATE, "max_tokens": 3}, 500, "cannot decode"),
        ({"prompt": LATE, "max_tokens": 3, "stream": True}, 500, "cannot decode"),
        ({"prompt": [*LATE, A], "max_tokens": 1, "logprobs": 1, "n": 2}, 500, "cannot decode"),
        ({"prompt": LATE, "max_tokens": 1, "echo": True, "logprobs": 1}, 500, "cannot decode"),
    ],
)
def test_over_http_it_is_an_error_with_a_reason(body: dict[str, Any], status: int, message: str) -> None:
    answer = post(body)
    assert answer.status_code == status, answer.text
    assert message in answer.text
    assert post({"prompt": "a", "max_tokens": 2}).json()["choices"][0]["text"] == "aa"


def post(body: dict[str, Any]) -> httpx.Response:
    async def call() -> httpx.Response:
        app = create_app(LocalEngine(panicking()), ServerConfig(served_model_name="toy"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://toy") as client:
            return await client.post("/v1/completions", json=body)

    return asyncio.run(call())


# A tokenizer of another model


def test_an_end_of_sequence_beyond_the_vocabulary_is_refused_at_the_start() -> None:
    backend = byte_level_backend()
    backend.add_special_tokens(["<far>"])
    tokenizer = toy_tokenizer(backend, eos_token="<far>")
    with pytest.raises(TokenizerError, match=r"the tokenizer ends .* token id 320, .* 300 tokens .* tokenizer 321"):
        OutputProcessor(dataclasses.replace(fake_facts(), vocab_size=300), tokenizer)
    with pytest.raises(TokenizerError, match=r"the model's config ends .* token id 7, 9, .* 5 tokens"):
        OutputProcessor(dataclasses.replace(fake_facts(), vocab_size=5, eos_token_ids=(0, 7, 9)), None)


def test_an_llm_with_such_a_tokenizer_does_not_start(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    backend = byte_level_backend()
    backend.add_special_tokens(["<far>"])
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, backend, eos_token="<far>")
    with pytest.raises(TokenizerError, match="token id 320"):
        LLM(str(folder), tokenizer=str(other), **ENGINE_OPTIONS)
    # More tokens than the model has are fine as long as no prompt has one.
    write_tokenizer(other, backend)
    with LLM(str(folder), tokenizer=str(other), **ENGINE_OPTIONS) as llm:
        (output,) = llm.generate("hello", SamplingParams(max_tokens=2), use_tqdm=False)
        assert len(output.outputs[0].token_ids) <= 2
        with pytest.raises(ValueError, match=r"token id 320 is out of vocabulary, which has 320 tokens"):
            llm.generate(["hello", "a<far>b"], use_tqdm=False)
        llm.generate("hello", SamplingParams(max_tokens=1), use_tqdm=False)
