"""`LLM`: the real engine with a tiny random model, in this process."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tqdm import tqdm

from nanoflow import LLM, SamplingParams
from nanoflow.bench.measurement_window import ProgressRecorder
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.messages import EngineStats
from nanoflow.engine.prompts import PromptInput
from nanoflow.models.config_json import ModelError
from nanoflow.outputs import FinishReason
from nanoflow.request import RequestError
from tests.error_chain import is_shown_alone
from tests.toy_models import ENGINE_OPTIONS, MAX_MODEL_LEN, write_toy_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, **ENGINE_OPTIONS) as llm:
        yield llm


def test_one_prompt_gives_a_list_of_one(llm: LLM) -> None:
    (output,) = llm.generate("hello world", GREEDY, use_tqdm=False)
    (completion,) = output.outputs
    assert output.finished and output.prompt == "hello world"
    assert completion.finish_reason is FinishReason.LENGTH and len(completion.token_ids) == 8
    whole = llm.get_tokenizer().decode([*output.prompt_token_ids, *completion.token_ids])
    assert "hello world" + completion.text == whole


def test_a_model_that_is_nowhere_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("cannot reach the Hub") from ValueError("what the network said")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"'name-that-is-no-folder': no such folder here, and the Hub") as problem:
        LLM("name-that-is-no-folder")
    assert is_shown_alone(problem.value)


@pytest.mark.parametrize("call", ["generate", "chat"])
def test_what_is_wrong_with_a_prompt_is_one_error(call: str, llm: LLM) -> None:
    prompt = [5, -1] if call == "generate" else [{"role": "user", "content": "\udc80"}]
    with pytest.raises(RequestError) as problem:
        getattr(llm, call)([prompt, prompt], GREEDY, use_tqdm=False)
    assert str(problem.value).startswith("prompt 0: ") and is_shown_alone(problem.value)


def test_a_model_s_own_sampling_is_the_default(model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    recommended = {"temperature": 0.0, "max_new_tokens": 5, "top_p": 0.5, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    with LLM(str(folder), **ENGINE_OPTIONS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, top_p=0.5, max_tokens=5)
        outputs = llm.generate([[5, 6, 7], [5, 6, 7]], use_tqdm=False)
        assert len(outputs[0].outputs[0].token_ids) <= 5
        assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        assert len(llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].token_ids) == 9
    with LLM(str(folder), generation_config="vllm", **ENGINE_OPTIONS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"text {number}" for number in range(20)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + number % 7, ignore_eos=True) for number in range(20)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [one.max_tokens for one in params]


def test_dimensions_are_looked_at_before_anything_is_computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "generate", None)
    for wrong in (0, llm.facts.hidden_size + 1, "3", 1.5):
        with pytest.raises(RequestError, match="dimensions must be "):
            llm.embed("a", dimensions=wrong)  # type: ignore[arg-type]


def test_all_log_probabilities_are_a_distribution(model: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)
    with LLM(model, **ENGINE_OPTIONS, max_logprobs=-1) as llm:
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        vocab_size = llm.facts.vocab_size
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None
    for place in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs):
        assert place is not None and place.keys() == set(range(vocab_size))
        assert sum(math.exp(entry.logprob) for entry in place.values()) == pytest.approx(1.0, abs=1e-3)
        assert sorted(entry.rank or 0 for entry in place.values()) == list(range(1, vocab_size + 1))


def test_more_than_the_context_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(
        ValueError,
        match=rf"prompt 1: .*maximum context length is {MAX_MODEL_LEN} tokens; .* max_tokens is {MAX_MODEL_LEN}, ",
    ):
        llm.generate([[5], [5, 6, 7]], [GREEDY, SamplingParams(max_tokens=MAX_MODEL_LEN)], use_tqdm=False)


def test_chat_takes_parts_roles_and_variables(model: str) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ word | default('none') }}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    conversation: list[dict[str, Any]] = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    with LLM(model, **ENGINE_OPTIONS, chat_template=source) as llm:
        for kwargs, end in ((None, "none"), ({"word": "some"}, "some")):
            (output,) = llm.chat(conversation, GREEDY, use_tqdm=False, chat_template_kwargs=kwargs)
            assert llm.get_tokenizer().decode(output.prompt_token_ids) == "[developer]d[user]a\nb" + end
        (output,) = llm.chat(conversation[1:], GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}")
        assert llm.get_tokenizer().decode(output.prompt_token_ids) == "a\nb"
        with pytest.raises(ValueError, match=r"prompt 1: messages\[0\].role must be a text"):
            llm.chat([conversation, [{"content": "x"}]], GREEDY, use_tqdm=False)
        with pytest.raises(ValueError, match="chat_template_kwargs cannot hold 'messages'"):
            llm.chat(conversation, GREEDY, use_tqdm=False, chat_template_kwargs={"messages": []})
    with pytest.raises(EngineDeadError, match="closed"):
        llm.chat(conversation, GREEDY, use_tqdm=False)


def test_iterations_add_up_to_prompts_and_completions(model: str) -> None:
    """Chunks of a prompt, its first token and the others."""

    class Counts(ProgressRecorder):
        num_tokens = 0

        def observe_step(self, stats: EngineStats) -> None:
            self.num_tokens += stats.iteration_tokens + stats.prefill_ends

    counts = Counts()
    with LLM(model, **{**ENGINE_OPTIONS, "max_batch_tokens": 16}) as llm:
        llm.observe(counts)
        outputs = llm.generate([[5, 6, 7], [8, 9] * 15], GREEDY, use_tqdm=False)
    assert counts.num_tokens == 3 + 30 + sum(len(output.outputs[0].token_ids) for output in outputs)


def test_an_observer_sees_every_iteration(llm: LLM) -> None:
    recorder = ProgressRecorder()
    llm.observe(recorder)
    outputs = llm.generate([[5, 6, 7]] * 3, GREEDY, use_tqdm=False)
    llm.observe(None)
    # The last token of a completion is not computed on any more.
    assert recorder.progress[-1].num_tokens == sum(3 + len(output.outputs[0].token_ids) - 1 for output in outputs)
    assert len(recorder.progress) == 8
    llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    assert len(recorder.progress) == 8


def test_forms_of_a_prompt_give_the_same(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    prompts: list[PromptInput] = ["hello", {"prompt": "hello"}, ids, {"prompt_token_ids": ids}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    outputs += llm.generate(ids, GREEDY, use_tqdm=False)
    assert len(outputs) == 5
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_seeds_make_samples_repeat_and_completions_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True)
    first, again = (llm.generate("hello", params, use_tqdm=False)[0].outputs for _ in range(2))
    texts = [tuple(completion.token_ids) for completion in first]
    assert texts == [tuple(completion.token_ids) for completion in again]
    assert len(set(texts)) == 3


def test_logprobs_of_tokens_and_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate("hello world", params, use_tqdm=False)
    (completion,) = output.outputs
    assert completion.logprobs is not None and completion.cumulative_logprob is not None
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert position[token_id].rank == 1 and len(position) == 2
    chosen = [position[t].logprob for t, position in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    for token_id, scores in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert scores is not None and token_id in scores


def test_stop_strings_free_the_engine(llm: LLM) -> None:
    (free,) = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), use_tqdm=False)
    stop = free.outputs[0].text[3:5]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, stop=stop)
    (output,) = llm.generate("hello", params, use_tqdm=False)
    assert output.outputs[0].text == free.outputs[0].text.partition(stop)[0]
    assert output.outputs[0].stop_reason == stop


def test_chat_uses_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == "[user]hello[assistant]"
    outputs = llm.chat([conversation, conversation], GREEDY, use_tqdm=False)
    assert [one.outputs[0].token_ids for one in outputs] == [output.outputs[0].token_ids] * 2


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_a_bad_prompt_is_named_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match=rf"prompt 2: .*the prompt has {MAX_MODEL_LEN} tokens"):
        prompts: list[PromptInput] = ["a", "b", [5] * MAX_MODEL_LEN]
        llm.generate(prompts, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY], use_tqdm=False)
    assert len(llm.generate(["a", "b"], GREEDY, use_tqdm=False)) == 2


@pytest.mark.parametrize("delay_s", [0.005, 0.02, 0.05, 0.2, 0.6])
def test_ctrl_c_leaves_the_model_usable(llm: LLM, delay_s: float) -> None:
    """While prompts are checked, while they are handed over, and while they run."""
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        # Where the machine is busy the signal may come before the thread is known to run.
        timer.start()
        llm.generate([[5]] * 2000, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    expected = llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    stats = llm._engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.pages_in_use) == (0, 0, 0)


def test_the_bar_counts_requests_and_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=tqdm)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "output tokens/s" in shown
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""  # it is no terminal


def test_limits_that_are_not_given_are_chosen_for_throughput(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"load_format": "dummy", "device": "cpu", "num_threads": 1, "block_size": 8, "enforce_eager": True}
    with LLM(model, **options) as llm:
        facts = llm.facts
    assert facts.page_size == 8
    assert facts.limits is not None and facts.limits.goal == "throughput"
    assert (facts.max_batch_tokens, facts.max_num_seqs) == (facts.limits.max_batch_tokens, facts.limits.max_num_seqs)
    # Only a terminal is told.
    assert "limits for" not in capsys.readouterr().err
    build_engine(EngineConfig(model=model, **ENGINE_OPTIONS), show_progress=True).close()
    said = [line for line in capsys.readouterr().err.splitlines() if "limits for" in line]
    assert len(said) == 1 and said[0].startswith("limits for balanced: max_batch_tokens 512 (goal balanced)")


def test_unknown_options_name_the_nearest(model: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_batch_tokens'"):
        LLM(model, max_batch_token=5)


def test_a_missing_model_is_one_line() -> None:
    with pytest.raises(ValueError, match="/nowhere/at/all") as problem:
        LLM("/nowhere/at/all")
    assert "\n" not in str(problem.value)


def test_a_closed_model_says_so(model: str) -> None:
    llm = LLM(model, **ENGINE_OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("hello")
