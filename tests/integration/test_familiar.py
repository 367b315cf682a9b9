"""What users of vLLM do with an engine, with a tiny random model: calls, outputs, and engines of other names."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nanoflow import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    LLMEngine,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.llm_metrics import Counter, Gauge
from tests.toy_models import ENGINE_OPTIONS, write_toy_model

IDS = [5, 6, 7]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, **ENGINE_OPTIONS, tensor_parallel_size=1, trust_remote_code=False, seed=None) as llm:
        yield llm


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def joined(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.outputs[0].token_ids]


def test_forms_of_prompts(llm: LLM) -> None:
    (expected,) = tokens(llm.generate([IDS], GREEDY, use_tqdm=False))
    forms: list[Any] = [IDS, TokensPrompt(prompt_token_ids=IDS), {"prompt_token_ids": IDS, "multi_modal_data": None}]
    for form in forms:
        assert tokens(llm.generate(form, GREEDY, False)) == [expected]
    assert tokens(llm.generate(prompt_token_ids=[IDS, IDS], sampling_params=GREEDY, use_tqdm=False)) == [expected] * 2
    (output,) = llm.generate(TokensPrompt(prompt_token_ids=IDS, prompt="shown"), GREEDY, use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids, output.outputs[0].token_ids) == ("shown", IDS, expected)
    text: list[Any] = ["hello", TextPrompt(prompt="hello"), {"prompt": "hello", "mm_processor_kwargs": {}}]
    first, *others = tokens(llm.generate(text, [GREEDY] * 3, use_tqdm=False))
    assert others == [first, first]
    assert tokens(llm.generate(["a"], GREEDY, lora_request=None, priority=[0], use_tqdm=False))


@pytest.mark.parametrize(
    ("prompt", "others", "message"),
    [
        ("a", {"lora_request": object()}, "lora_request=.*merge the adapter"),
        ("a", {"priority": [1, 2]}, "2 priorities for 1 prompts"),
        ("a", {"priority": "low"}, "priority must be an integer or 'batch'"),
        ("a", {"guided_options_request": {}}, "give `structured_outputs` of SamplingParams"),
        ("a", {"tokenization_kwargs": {"truncate_prompt_tokens": 3}}, "is a parameter of SamplingParams"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, {}, "models take text alone"),
        ({"prompt_embeds": [1.0]}, {}, "prompts are text or token ids"),
        ({"prompts": "a"}, {}, "'prompt' or 'prompt_token_ids', got 'prompts'"),
        ({"prompt": [1]}, {}, "'prompt' of a prompt cannot be a list"),
        ({}, {}, "got nothing"),
        (None, {}, "needs a prompt"),
        (["a"], {"prompt_token_ids": [[1], [2]]}, "1 prompts and 2 prompt_token_ids"),
    ],
)
def test_what_a_call_cannot_have(llm: LLM, prompt: Any, others: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, GREEDY, use_tqdm=False, **others)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fresh'"):
        llm.generate("a", GREEDY, fresh=1)


def test_a_bar_of_ones_own(llm: LLM) -> None:
    made: list[dict[str, Any]] = []

    class Bar:
        n = 0

        def __init__(self, **how: Any) -> None:
            made.append(how)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            pass

        def update(self, count: int) -> None:
            self.n += count

    llm.generate([IDS, IDS], GREEDY, use_tqdm=Bar)
    assert [how["total"] for how in made] == [2]


def test_an_output_has_the_fields_that_are_read(llm: LLM) -> None:
    before = time.time()
    (output,) = llm.generate([IDS], SamplingParams(n=2, max_tokens=4, ignore_eos=True, seed=1), use_tqdm=False)
    assert output.num_cached_tokens == 0 and output.finished and output.prompt_logprobs is None
    assert all(completion.finished() for completion in output.outputs)
    metrics = output.metrics
    assert metrics is not None and metrics.num_generation_tokens == 8 and not metrics.is_corrupted
    assert before - 1 < metrics.arrival_time < time.time() + 1
    assert metrics.queued_ts <= metrics.scheduled_ts <= metrics.first_token_ts <= metrics.last_token_ts
    assert 0 < metrics.first_token_latency < 60 and metrics.time_in_queue is not None
    assert metrics.first_token_time is not None and metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time + 0.01


def test_metrics_count_what_was_done(model: str) -> None:
    with LLM(model, **ENGINE_OPTIONS) as llm:
        llm.generate([IDS, IDS], GREEDY, use_tqdm=False, priority=[0, "batch"])
        found = llm.get_metrics()
        metrics = {metric.name.partition(":")[2]: metric for metric in found}
        assert llm.reset_prefix_cache() is True
    values = {name: metric.value for name, metric in metrics.items()}
    apart = {
        (name, metric.labels["priority"]): metric.value
        for metric in found
        if (name := metric.name.partition(":")[2]) == "tokens_by_priority"
    }
    assert apart == {("tokens_by_priority", "interactive"): 10, ("tokens_by_priority", "batch"): 10}
    assert {
        name: value for name, value in values.items() if not name.startswith("spec_decode_") and "_by_" not in name
    } == {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0.0,
        "num_preemptions": 0,
        "prefix_cache_queries": 6,
        "prefix_cache_hits": 0,
        "prompt_tokens": 6,
        "generation_tokens": 16,
        "request_success": 2,
    }
    assert isinstance(metrics["prompt_tokens"], Counter) and isinstance(metrics["num_requests_running"], Gauge)
    assert all(metric.labels["model_name"] == model for metric in found)


def test_the_tokenizer_is_that_of_transformers(llm: LLM) -> None:
    from transformers import PreTrainedTokenizerBase

    tokenizer = llm.get_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerBase) and llm.get_tokenizer() is tokenizer
    assert tokenizer.encode("hello world") == llm.tokenizer.encode("hello world")
    conversation = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == ids


def test_tokens_of_a_class_that_has_others_are_put_right(llm: LLM) -> None:
    class Fast:
        is_fast = True
        _tokenizer: Any = None
        chat_template = "theirs"

    class Slow(Fast):
        is_fast = False

    fast, slow = Fast(), Slow()
    for tokenizer in (fast, slow):
        llm.tokenizer.put_into(tokenizer)
        assert tokenizer.chat_template not in (None, "theirs")
    assert fast._tokenizer.encode("hello").ids == llm.tokenizer.encode("hello") and slow._tokenizer is None


def test_chat_takes_what_changes_nothing(llm: LLM) -> None:
    conversation: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
    (first,) = llm.chat(conversation, GREEDY, False)
    (second,) = llm.chat(
        conversation, GREEDY, False, tools=None, chat_template_content_format="auto", lora_request=None
    )
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    with pytest.raises(RequestError, match=r"chat_template_content_format=.* is not possible"):
        llm.chat(conversation, GREEDY, False, chat_template_content_format="openai")


def test_chat_takes_tools(llm: LLM) -> None:
    conversation: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    (output,) = llm.chat(conversation, GREEDY, False, tools=tools, chat_template="{{ tools[0].function.name }}")
    assert output.prompt_token_ids == llm.tokenizer.encode("add", add_special_tokens=False)
    with pytest.raises(RequestError, match="does not know tools"):
        llm.chat(conversation, GREEDY, False, tools=tools)
    with pytest.raises(RequestError, match=r"tools\[0\]\.function must be an object"):
        llm.chat(conversation, GREEDY, False, tools=[{"type": "function"}])


def test_without_a_tokenizer_prompts_and_completions_are_ids(model: str) -> None:
    with LLM(model, **ENGINE_OPTIONS, skip_tokenizer_init=True) as llm:
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=IDS), GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8 and output.outputs[0].text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate("text", GREEDY, use_tqdm=False)
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.get_tokenizer()


def test_engine_args_are_options(model: str) -> None:
    args = AsyncEngineArgs(model=model, enforce_eager=True, max_num_batched_tokens=64, tensor_parallel_size=1)
    assert args.config() == EngineConfig(model=model, cuda_graphs=False, max_batch_tokens=64)
    assert args.enforce_eager is True and args.max_batch_tokens == 64 and args.dtype == "auto"
    assert from_dict(dataclasses.asdict(args)) == args.config()  # type: ignore[call-overload]
    setattr(args, "max_num_batched_tokens", 32)  # noqa: B010
    assert args.config().max_batch_tokens == 32 and "max_num_batched_tokens=32" in repr(args)
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 is not possible"):
        EngineArgs(model=model, tensor_parallel_size=2)
    with pytest.raises(AttributeError, match="EngineArgs has no option 'fresh'"):
        args.fresh  # noqa: B018


def from_dict(values: dict[str, Any]) -> EngineConfig:
    return EngineConfig(**values)


def test_engine_args_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    parser.add_argument("--mine", default=1)
    args = parser.parse_args(["--model", "m", "--max-num-batched-tokens", "64", "-tp", "1", "--enforce-eager"])
    assert EngineArgs.from_cli_args(args) == EngineArgs(model="m", max_batch_tokens=64, cuda_graphs=False)
    with pytest.raises(SystemExit):
        parser.parse_args(["-tp", "2"])
    assert "-tp 2 is not possible: one GPU" in capsys.readouterr().err


def test_an_engine_that_is_driven_step_by_step(model: str, llm: LLM) -> None:
    (expected,) = tokens(llm.generate([IDS], GREEDY, use_tqdm=False))
    engine = LLMEngine.from_engine_args(EngineArgs(model=model, **ENGINE_OPTIONS))
    assert engine.step() == []
    final, delta = GREEDY.clone(), GREEDY.clone()
    final.output_kind, delta.output_kind = RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA
    for name, params in (("all", GREEDY), ("end", final), ("new", delta), ("gone", GREEDY)):
        engine.add_request(name, TokensPrompt(prompt_token_ids=IDS), params)
    engine.abort_request("gone")
    seen: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    assert seen.keys() == {"all", "end", "new"} and engine.get_num_unfinished_requests() == 0
    assert [len(output.outputs[0].token_ids) for output in seen["all"]] == list(range(1, 9))
    assert [len(output.outputs[0].token_ids) for output in seen["new"]] == [1] * 8
    assert [len(outputs) for outputs in seen.values() if outputs[0].request_id == "end"] == [1]
    assert seen["all"][-1].outputs[0].token_ids == seen["end"][0].outputs[0].token_ids == expected
    assert joined(seen["new"]) == expected
    engine.shutdown()
    with pytest.raises(AttributeError, match=r"LLMEngine has no model_config: `LLM\.facts`"):
        engine.model_config  # noqa: B018


async def collect(
    engine: AsyncLLM, name: str, kind: RequestOutputKind, params: SamplingParams = GREEDY
) -> list[RequestOutput]:
    params = params.clone()
    params.output_kind = kind
    return [output async for output in engine.generate("hello", params, request_id=name)]


def test_many_callers_at_once(model: str, llm: LLM) -> None:
    (expected,) = llm.generate(["hello"], GREEDY, use_tqdm=False)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **ENGINE_OPTIONS), usage_context=None)
    asyncio.run(check_async(engine, expected))
    assert not engine.is_running


async def check_async(engine: AsyncLLM, expected: RequestOutput) -> None:
    kinds = RequestOutputKind
    scored = GREEDY.clone()
    scored.logprobs = 1
    everything, new, end, scores = await asyncio.gather(
        collect(engine, "a", kinds.CUMULATIVE),
        collect(engine, "b", kinds.DELTA),
        collect(engine, "c", kinds.FINAL_ONLY),
        collect(engine, "d", kinds.DELTA, scored),
    )
    text, ids = expected.outputs[0].text, expected.outputs[0].token_ids
    lengths = [len(output.outputs[0].token_ids) for output in everything]
    assert lengths == sorted(set(lengths)) and len(lengths) > 1, "copies that stay as they are"
    assert everything[-1].outputs[0].token_ids == ids and everything[-1].outputs[0].text == text
    assert len(end) == 1 and end[0].finished and end[0].outputs[0].text == text
    assert "".join(output.outputs[0].text for output in new) == text and len(new) > 1
    assert joined(new) == ids
    assert [len(output.outputs[0].logprobs or ()) for output in scores] == [
        len(output.outputs[0].token_ids) for output in scores
    ]
    assert end[0].metrics is not None and end[0].metrics.num_generation_tokens == 8
    await check_abort_and_end(engine)


async def check_abort_and_end(engine: AsyncLLM) -> None:
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    last = None
    async for output in engine.generate("hello", long, request_id="long"):
        last = output
        if not output.finished:
            await engine.abort("long")
    assert last is not None and last.outputs[0].finish_reason == "abort"
    with pytest.raises(RequestError, match="lora_request="):
        [_ async for _ in engine.generate("a", GREEDY, "x", lora_request=1)]
    assert engine.is_running and not engine.errored and await engine.reset_prefix_cache()
    assert (await engine.get_tokenizer()).encode("hello")
    await engine.check_health()
    running = asyncio.create_task(collect(engine, "late", RequestOutputKind.FINAL_ONLY, long))
    await asyncio.sleep(0.05)
    engine.shutdown()
    with pytest.raises(EngineDeadError):
        await running
    await engine.closed()
    with pytest.raises(EngineDeadError, match="shut down"):
        await collect(engine, "too late", RequestOutputKind.DELTA)


def test_a_model_that_is_not_there_is_told_to_every_caller(tmp_path: Any) -> None:
    async def check() -> None:
        engine = AsyncLLM.from_engine_args(EngineArgs(model=str(tmp_path / "nothing")))
        results = await asyncio.gather(
            *(collect(engine, name, RequestOutputKind.DELTA) for name in "ab"), return_exceptions=True
        )
        assert all(isinstance(result, Exception) and "nothing" in str(result) for result in results)
        assert engine.errored and not engine.is_running and "nothing" in str(engine.dead_error)
        engine.shutdown()

    asyncio.run(check())
