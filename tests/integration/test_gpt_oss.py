"""gpt-oss end to end on a CPU: windows and full layers with a prefix cache and preemption, and how an answer ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from tokenizers import AddedToken

from nanoflow.engine.llm import LLM
from nanoflow.request import SamplingParams
from tests.driving import HuggingFace, expect_less, random_prompts
from tests.fake_server import served
from tests.families import make_model
from tests.mxfp4 import write_twins
from tests.scripted_engine import ScriptedEngine
from tests.templates import HARMONY
from tests.toy_models import ENGINE_OPTIONS
from tests.toy_tokenizers import byte_level_backend, toy_tokenizer, write_tokenizer

MAX_TOKENS = 20
SPECIAL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
VOCAB_SIZE = 340


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In MXFP4, with a tokenizer and a template like those of the published models; `twin` has the plain numbers."""
    folder = make_model("gpt-oss", tmp_path_factory.mktemp("gpt-oss"), seed=1, vocab_size=VOCAB_SIZE)
    write_twins(folder)
    backend = byte_level_backend()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    write_tokenizer(folder, backend, chat_template=HARMONY, eos_token="<|return|>")
    ends = [backend.token_to_id(token) for token in ("<|return|>", "<|call|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": True}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends[0]}))
    yield folder


def test_cached_prefixes_and_preemption_change_no_token(model: Path) -> None:
    """Prompts of several windows with a common beginning, in a pool that has no room for all of them."""
    common, *ends = random_prompts(7, 131, longest=30, seed=3)
    prompts = [(common * 90)[:90] + end for end in ends]
    expected = HuggingFace(model / "twin").generate(prompts, MAX_TOKENS)
    assert len({tuple(tokens) for tokens in expected}) > 3, "the model must have something to say"
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    options = {
        **ENGINE_OPTIONS,
        "load_format": "auto",
        "max_num_seqs": 8,
        "max_batch_tokens": 32,
        "page_size": 4,
        "num_pages": 70,
    }
    with closing(LLM(str(model), skip_tokenizer_init=True, max_model_len=160, **options)) as llm:
        expect_less(llm._engine, MAX_TOKENS)
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        stats = llm._engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_cache_hits > 0
        llm._engine.check_integrity()


@pytest.mark.parametrize("end", ["<|return|>", "<|call|>"])
def test_an_answer_ends_at_the_tokens_of_generation_config(model: Path, end: str) -> None:
    with closing(LLM(str(model), **ENGINE_OPTIONS)) as llm:
        tokenizer = llm.get_tokenizer()
        token_id = tokenizer.convert_tokens_to_ids(end)
        # The model has random weights: the end is drawn as soon as it may be.
        params = SamplingParams(temperature=0.0, max_tokens=8, min_tokens=3, logit_bias={token_id: 100.0})
        (output,) = llm.chat([{"role": "user", "content": "hello"}], params, use_tqdm=False)
        assert tokenizer.decode(output.prompt_token_ids).endswith(
            "<|start|>user<|message|>hello<|end|><|start|>assistant"
        )
        answer = output.outputs[0]
        assert answer.finish_reason == "stop"
        assert (len(answer.token_ids), answer.token_ids[-1]) == (4, token_id)
        assert end not in answer.text
        # A message that ends does not end the answer: the next one may be in another channel.
        other = tokenizer.convert_tokens_to_ids("<|end|>")
        params = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={other: 100.0})
        (output,) = llm.chat([{"role": "user", "content": "hello"}], params, use_tqdm=False)
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("length", [other] * 5)


def test_channels_of_an_answer_are_its_reasoning_its_calls_and_its_content() -> None:
    """Over HTTP, with the effort in the prompt. A call ends with the answer: its last mark is not there."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    thought = "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant"
    texts = (
        f'{thought}<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{{"city": "Paris"}}',
        f"{thought}<|channel|>final<|message|>It rains.",
    )
    backend = byte_level_backend()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + HARMONY
    engine = ScriptedEngine(toy_tokenizer(backend, chat_template=template), texts)
    fields = {"messages": [{"role": "user", "content": "weather?"}], "tools": [tool], "reasoning_effort": "high"}
    with served(engine) as root_url:
        answers = [httpx.post(f"{root_url}/v1/chat/completions", json=fields).json()["choices"][0] for _ in texts]
    engine.tokenizer.close()
    first, second = (answer["message"] for answer in answers)
    assert first["reasoning_content"] == second["reasoning_content"] == "Let me look."
    (call,) = first["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("weather", '{"city": "Paris"}')
    assert (first["content"], second["content"], second["tool_calls"] or []) == (None, "It rains.", [])
    assert [answer["finish_reason"] for answer in answers] == ["tool_calls", "stop"]
    assert all("Reasoning: high" in prompt for prompt in engine.prompts)
    assert not any(params.skip_special_tokens for params in engine.seen_params)
