"""What users read: text, stop strings, log probabilities, reasons, times, and the border where prompts come in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from nanoflow.engine.messages import EngineStats, PlaceLogprobs, StepOutput
from nanoflow.engine.observer import FinishedRequest
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import Prompt, PromptInput, make_requests, read_prompt
from nanoflow.outputs import Finished, FinishReason, RequestOutput
from nanoflow.request import MAX_BAD_WORD_TOKENS, Request, RequestError, SamplingParams
from tests.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine, fake_facts
from tests.toy_tokenizers import toy_tokenizer

TOKENIZER = toy_tokenizer()
EOS_ID = 0


@dataclass
class Recorder:
    """An observer that keeps all it is told."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    finished: list[FinishedRequest] = field(default_factory=list)
    steps: list[EngineStats] = field(default_factory=list)

    def observe_step(self, stats: EngineStats) -> None:
        self.steps.append(stats)

    def observe_first_token(self, ttft_s: float, num_prompt_tokens: int) -> None:
        self.ttft_s.append(ttft_s)

    def observe_tokens(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    def observe_next_tokens(self, latencies_s: Sequence[float]) -> None:
        self.itl_s += latencies_s

    def observe_finished(self, request: FinishedRequest) -> None:
        self.finished.append(request)


def make_processor(clock: Callable[[], float] | None = None, *, seed: int = 0) -> OutputProcessor:
    ticks = itertools.count(1.0)
    return OutputProcessor(fake_facts(), TOKENIZER, seed=seed, clock=clock or (lambda: next(ticks)))


def add(processor: OutputProcessor, prompt: Any, name: str = "a", **params: Any) -> tuple[RequestOutput, list[Request]]:
    return processor.add(name, read_prompt(prompt, TOKENIZER), SamplingParams(**params))


def run(processor: OutputProcessor, engine: FakeEngine, requests: list[Request]) -> Iterator[RequestOutput]:
    """Drive the fake engine to the end; yield the outputs that had news."""
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in processor.process(engine.step()):
            processor.refresh(output)
            yield output
        engine.abort(processor.take_stopped())


def complete(prompt: Any, **params: Any) -> RequestOutput:
    """The finished output of one request; the fake engine repeats the prompt."""
    processor = make_processor()
    output, requests = add(processor, prompt, **params)
    for _ in run(processor, FakeEngine(), requests):
        pass
    assert output.finished and not len(processor)
    return output


# Text and reasons


def test_length_ends_a_completion_with_all_its_text() -> None:
    output = complete("hello world", max_tokens=40)
    (completion,) = output.outputs
    ids = TOKENIZER.encode("hello world")
    assert completion.token_ids == [ids[i % len(ids)] for i in range(40)]
    assert completion.text == TOKENIZER.decode(completion.token_ids)
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.LENGTH, None)


def test_end_of_sequence_is_a_token_but_no_text() -> None:
    output = complete([*TOKENIZER.encode("hello"), EOS_ID], skip_special_tokens=False)
    assert output.outputs[0].token_ids[-1] == EOS_ID
    assert output.outputs[0].text == "hello"
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, None)


def test_stop_token_is_named_and_no_text() -> None:
    ids = TOKENIZER.encode("hello, world")
    comma = TOKENIZER.encode(",")[0]
    (completion,) = complete(ids, stop_token_ids=[comma]).outputs
    assert (completion.text, completion.stop_reason, completion.token_ids[-1]) == ("hello", comma, comma)
    (kept,) = complete(ids, stop_token_ids=[comma], include_stop_str_in_output=True).outputs
    assert kept.text == "hello,"


def test_ignore_eos_goes_on() -> None:
    output = complete([5, EOS_ID], ignore_eos=True, max_tokens=7)
    assert output.outputs[0].finish_reason is FinishReason.LENGTH
    assert len(output.outputs[0].token_ids) == 7


def test_max_tokens_none_runs_to_the_end_of_the_context() -> None:
    assert len(complete([5] * 200, max_tokens=None).outputs[0].token_ids) == MAX_MODEL_LEN - 200


def test_what_does_not_fit_in_the_context_is_refused_with_the_sizes() -> None:
    room = MAX_MODEL_LEN - 200
    assert len(complete([5] * 200, max_tokens=room).outputs[0].token_ids) == room
    with pytest.raises(
        ValueError,
        match=rf"context length is {MAX_MODEL_LEN} tokens; .* 200 tokens and max_tokens is {room + 1}, together",
    ):
        complete([5] * 200, max_tokens=room + 1)
    assert len(complete([5] * (MAX_MODEL_LEN - 3)).outputs[0].token_ids) == 3, "nobody has asked for 16"
    with pytest.raises(RequestError, match="the prompt has 256 tokens") as caught:
        complete([5] * MAX_MODEL_LEN, max_tokens=1)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(RequestError, match="maximum context length") as caught:
        complete([5] * 200, max_tokens=room + 1)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")


def with_max_logprobs(max_logprobs: int, prompt: Sequence[int], **params: Any) -> list[Request]:
    """The requests of a prompt in an engine with this limit."""
    facts = dataclasses.replace(fake_facts(), max_logprobs=max_logprobs)
    options: dict[str, Any] = {"first_id": 0, "first_seed": 0, "eos_token_ids": (), "arrival_s": 0.0}
    return make_requests(Prompt(text=None, token_ids=list(prompt)), SamplingParams(**params), facts=facts, **options)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_have_a_limit_of_the_engine(name: str) -> None:
    assert getattr(with_max_logprobs(20, [5], **{name: 20})[0].params, name) == 20
    assert getattr(with_max_logprobs(VOCAB_SIZE, [5], **{name: -1})[0].params, name) == VOCAB_SIZE
    for too_many in (21, -1):
        with pytest.raises(ValueError, match=rf"{name} is \d+, this engine gives at most 20 \(max_logprobs\)"):
            with_max_logprobs(20, [5], **{name: too_many})


def test_all_log_probabilities_of_many_tokens_are_too_many() -> None:
    """A request of a few bytes must not ask for gigabytes."""
    with pytest.raises(ValueError, match=r"logprobs is 400 at 31744 tokens, more than 8388608 numbers in all"):
        with_max_logprobs(VOCAB_SIZE, [5] * 8, logprobs=-1, max_tokens=248, n=128)
    assert with_max_logprobs(20, [5] * 8, logprobs=20, max_tokens=None, n=128)


def test_without_text_there_are_only_tokens() -> None:
    output = complete("hello", detokenize=False, logprobs=1)
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 16
    assert output.outputs[0].logprobs is not None
    assert all(logprob.decoded_token is None for logprob in output.outputs[0].logprobs[0].values())


def test_an_incomplete_character_is_shown_at_the_end_only() -> None:
    processor = make_processor()
    ids = TOKENIZER.encode("🎓")
    output, requests = add(processor, ids, max_tokens=len(ids) - 1)
    texts = [item.outputs[0].text for item in run(processor, FakeEngine(), requests)]
    assert set(texts[:-1]) <= {""} and output.outputs[0].text == "\ufffd"


# Stop strings


def test_a_stop_string_ends_a_completion_and_the_engine_is_told() -> None:
    processor, engine = make_processor(), FakeEngine()
    output, requests = add(processor, "hello world, this", stop=["wor", "zzz"], max_tokens=100)
    shown = [item.outputs[0].text for item in run(processor, engine, requests)]
    (completion,) = output.outputs
    assert completion.text == "hello "
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, "wor")
    assert engine.aborted == [requests[0].request_id]
    assert all("hello ".startswith(text) for text in shown)


def test_a_stop_string_may_stay_in_the_text() -> None:
    assert complete("hello world", stop="wor", include_stop_str_in_output=True).outputs[0].text == "hello wor"


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    num_tokens = len(TOKENIZER.encode("hello world"))
    (completion,) = complete("hello world", stop="wor", min_tokens=num_tokens + 1, max_tokens=60).outputs
    assert completion.text == "hello worldhello "
    assert completion.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("min_tokens", "num_tokens"),
    [(0, 3), (1, 3), (2, 3), (3, 6), (4, 6), (5, 6), (6, 9), (7, 9)],
)
def test_a_stop_string_counts_if_it_is_complete_behind_min_tokens(min_tokens: int, num_tokens: int) -> None:
    """Complete with token 3, 6, 9, ...: within the first `min_tokens`, its last one included, it ends nothing."""
    ids = [TOKENIZER.encode(char)[0] for char in "abX"]
    (completion,) = complete(ids, stop="bX", min_tokens=min_tokens, max_tokens=60).outputs
    assert (len(completion.token_ids), completion.stop_reason) == (num_tokens, "bX")
    assert completion.text == "abX" * (num_tokens // 3 - 1) + "a"


def test_a_stop_string_may_begin_within_min_tokens() -> None:
    ids = [TOKENIZER.encode(char)[0] for char in "abcd"]
    (completion,) = complete(ids, stop="abcd", min_tokens=3, max_tokens=60).outputs
    assert (len(completion.token_ids), completion.text) == (4, "")


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    assert complete("hello", stop="helloX", max_tokens=len(TOKENIZER.encode("hello"))).outputs[0].text == "hello"


# Several completions


def test_the_first_token_is_that_of_any_completion() -> None:
    times_s = iter([1.0, 2.0, 5.0])
    processor = make_processor(lambda: next(times_s))
    processor.observer = recorder = Recorder()
    output, requests = add(processor, "hello", n=2)
    for request in reversed(requests):
        processor.process(StepOutput(request_ids=[request.request_id], token_ids=[7]))
    assert output.metrics is not None and output.metrics.first_token_s == 2.0
    assert recorder.ttft_s == [1.0] and recorder.itl_s == []


@pytest.mark.parametrize("place", [0, 1])
def test_the_error_of_one_completion_is_told_whichever_ends_last(place: int) -> None:
    processor = make_processor()
    output, requests = add(processor, "hello", n=2)
    for at, request in enumerate(requests):
        failed, ended = Finished(reason=FinishReason.ERROR, error="no logits"), Finished(reason=FinishReason.LENGTH)
        processor.process(StepOutput(finished={request.request_id: failed if at == place else ended}))
    assert output.finished and output.error == "no logits"


def test_a_request_waits_until_its_first_completion_is_scheduled() -> None:
    times_s = iter([1.0, 2.0, 5.0])
    processor = make_processor(lambda: next(times_s))
    output, (first, second) = add(processor, "hello", n=2)
    for request in (second, first):
        processor.process(StepOutput(scheduled={request.request_id: 0}))
    assert output.metrics is not None and output.metrics.first_scheduled_s == 2.0


def test_n_completions_have_seeds_in_a_row_and_score_the_prompt_once() -> None:
    processor = make_processor()
    _, requests = add(processor, "hello", n=3, seed=2**64 - 2, prompt_logprobs=1)
    assert [request.seed for request in requests] == [2**64 - 2, 2**64 - 1, 0]
    assert [request.params.prompt_logprobs for request in requests] == [1, None, None]
    assert len({request.request_id for request in requests}) == 3


def test_drawn_seeds_follow_from_the_engines_seed() -> None:
    first, again, other = (add(make_processor(seed=seed), "hello")[1][0].seed for seed in (1, 1, 2))
    assert first == again != other


def test_n_completions_are_one_output_that_ends_with_the_last() -> None:
    processor, observer = make_processor(), Recorder()
    processor.observer = observer
    output, requests = add(processor, "hello", n=2, max_tokens=4)
    tokens = [5, 6, 7, 8]
    for i, token_id in enumerate(tokens):
        end = {requests[0].request_id: Finished(reason=FinishReason.LENGTH)} if i == 3 else {}
        list(processor.process(StepOutput(request_ids=[requests[0].request_id], token_ids=[token_id], finished=end)))
    assert output.outputs[0].is_finished and not output.finished and not observer.finished
    end = {requests[1].request_id: Finished(reason=FinishReason.LENGTH)}
    list(processor.process(StepOutput(request_ids=[requests[1].request_id], token_ids=[9], finished=end)))
    assert output.finished and len(observer.finished) == 1
    assert [completion.token_ids for completion in output.outputs] == [tokens, [9]]
    assert (observer.finished[0].num_generated_tokens, observer.finished[0].longest_completion_tokens) == (5, 4)


# Log probabilities


def test_logprobs_name_the_chosen_token_first() -> None:
    (completion,) = complete([5, 6], logprobs=2, max_tokens=3).outputs
    assert completion.logprobs is not None and len(completion.logprobs) == 3
    first = completion.logprobs[0]
    assert list(first) == [5, 1]
    assert (first[5].logprob, first[5].rank, first[5].decoded_token) == (-1.0, 2, TOKENIZER.token_text(5))
    assert (first[1].logprob, first[1].rank) == (-0.5, 1)
    assert completion.cumulative_logprob == -3.0


def test_logprobs_zero_gives_the_chosen_token_only() -> None:
    (completion,) = complete([5, 6], logprobs=0, max_tokens=2).outputs
    assert completion.logprobs is not None
    assert [list(position) for position in completion.logprobs] == [[5], [6]]


def test_prompt_logprobs_are_placed_and_may_come_twice() -> None:
    processor = make_processor()
    output, requests = add(processor, [5, 6, 7, 8], prompt_logprobs=1)
    part = PlaceLogprobs(
        first_position=1, token_ids=[[6, 3], [7, 3]], logprobs=[[-2.0, -1.0], [-4.0, -3.0]], ranks=[4, 9]
    )
    rest = PlaceLogprobs(first_position=3, token_ids=[[8, 3]], logprobs=[[-6.0, -5.0]], ranks=[2])
    for scores in (part, part, rest):
        processor.process(StepOutput(prompt_logprobs={requests[0].request_id: scores}))
    processor.refresh(output)
    positions = output.prompt_logprobs
    assert positions is not None and positions[0] is None
    assert [list(position) for position in positions[1:] if position] == [[6, 3], [7, 3], [8, 3]]


# Aborts, errors, times


def test_abort_ends_a_request_and_late_tokens_are_dropped() -> None:
    processor, engine = make_processor(), FakeEngine()
    output, requests = add(processor, "hello", n=2)
    for request in requests:
        engine.add(request)
    step = engine.step()
    list(processor.process(step))
    assert processor.abort("a") == [request.request_id for request in requests]
    assert output.finished
    assert {completion.finish_reason for completion in output.outputs} == {FinishReason.ABORT}
    assert list(processor.process(engine.step())) == []
    assert processor.abort("a") == [] and len(processor) == 0


def test_an_error_ends_its_request_alone() -> None:
    processor = make_processor()
    output, requests = add(processor, "hello", "a")
    other, _ = add(processor, "hello", "b")
    end = {requests[0].request_id: Finished(reason=FinishReason.ERROR, error="logits are not finite")}
    assert list(processor.process(StepOutput(finished=end))) == [output]
    assert (output.error, output.outputs[0].finish_reason) == ("logits are not finite", FinishReason.ERROR)
    assert not other.finished and other.error is None


def test_observer_counts_one_first_token_and_all_gaps() -> None:
    processor, engine, observer = make_processor(), FakeEngine(), Recorder()
    processor.observer = observer
    lengths = [1, 2, 9]
    requests = []
    for length in lengths:
        requests += add(processor, "hello", str(length), max_tokens=length)[1]
    for _ in run(processor, engine, requests):
        pass
    assert len(observer.ttft_s) == len(lengths)
    assert len(observer.itl_s) == sum(length - 1 for length in lengths)
    assert len(observer.steps) == max(lengths)
    assert [request.num_generated_tokens for request in observer.finished] == lengths


@pytest.mark.parametrize("num_steps", [1, 2, 5, 9])
def test_every_token_of_every_completion_is_counted_once_and_none_besides(num_steps: int) -> None:
    """Several completions, of which some have ended when the request is aborted."""
    processor, engine, observer = make_processor(), FakeEngine(), Recorder()
    processor.observer = observer
    many, requests = add(processor, "hello", "many", n=8, max_tokens=7, ignore_eos=True)
    few, more = add(processor, "hello world", "few", n=2, stop="wor", max_tokens=40)
    for request in (*requests, *more):
        engine.add(request)
    for _ in range(num_steps):
        processor.process(engine.step())
        engine.abort(processor.take_stopped())
    engine.abort(processor.abort("many"))
    processor.process(engine.step())
    processor.abort("few")
    made = [len(one.token_ids) for output in (many, few) for one in output.outputs]
    assert observer.num_tokens == sum(made) == sum(one.num_generated_tokens for one in observer.finished)
    assert len(observer.ttft_s) == 2 and len(observer.finished) == 2


def test_tokens_of_a_request_that_fails_are_counted_too() -> None:
    processor, observer = make_processor(), Recorder()
    processor.observer = observer
    _, requests = add(processor, "hello", n=2)
    first, second = (request.request_id for request in requests)
    processor.process(StepOutput(request_ids=[first, second], token_ids=[5, 6]))
    failed = Finished(reason=FinishReason.ERROR, error="no")
    processor.process(StepOutput(request_ids=[second], token_ids=[7], finished={first: failed}))
    end = {second: Finished(reason=FinishReason.LENGTH)}
    processor.process(StepOutput(request_ids=[second], token_ids=[8], finished=end))
    assert observer.num_tokens == 4
    # What its user is told is that it failed, whichever completion ended last.
    assert [one.reason for one in observer.finished] == [FinishReason.ERROR]


# What fails while answers are made


class Broken:
    """Fails from the second token on, as a detokenizer and wherever text of a token is asked for."""

    def __init__(self) -> None:
        self.num_calls = 0

    def push(self, token_ids: Sequence[int]) -> str:
        self.num_calls += 1
        if self.num_calls > 1:
            raise RuntimeError("broken")
        return "x"

    def flush(self) -> str:
        raise RuntimeError("broken")


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("params", [{}, {"stop": "zzz"}, {"n": 3}, {"logprobs": 1}])
def test_what_fails_while_text_is_made_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, reads: bool, params: dict[str, Any]
) -> None:
    processor, engine, observer = make_processor(), FakeEngine(), Recorder()
    processor.observer = observer
    good, requests = add(processor, "hello", "good", max_tokens=12)
    with monkeypatch.context() as patch:
        patch.setattr("nanoflow.engine.output.make_detokenizer", lambda *_: Broken())
        bad, more = add(processor, "hello", "bad", max_tokens=9, **params)
    for request in (*requests, *more):
        engine.add(request)
    while engine.has_work:
        for output in processor.process(engine.step()):
            if reads:
                processor.refresh(output)
        engine.abort(processor.take_stopped())
    assert not len(processor)
    assert bad.finished and {one.finish_reason for one in bad.outputs} == {FinishReason.ERROR}
    assert bad.error == "its answer could not be made of its tokens; the log says why"
    assert good.error is None and good.outputs[0].text == TOKENIZER.decode(good.outputs[0].token_ids)
    assert {one.reason for one in observer.finished} == {FinishReason.ERROR, FinishReason.LENGTH}
    # Where text is read as it grows, the engine is told at once.
    assert len(bad.outputs[0].token_ids) == (2 if reads or "stop" in params else 9)


def test_log_probabilities_that_cannot_be_read_end_their_request_alone() -> None:
    processor = make_processor()
    good, requests = add(processor, "hello", "good", logprobs=1)
    bad, more = add(processor, "hello", "bad", logprobs=1, prompt_logprobs=1)
    ids = [requests[0].request_id, more[0].request_id]
    right = PlaceLogprobs(first_position=0, token_ids=[[5]], logprobs=[[-1.0]], ranks=[1])
    wrong = msgspec.structs.replace(right, ranks=[])
    processor.process(
        StepOutput(request_ids=ids, token_ids=[5, 5], logprobs=dict(zip(ids, (right, wrong), strict=True)))
    )
    assert bad.finished and bad.error is not None and not good.finished
    assert processor.take_stopped() == ids[1:]
    scored, more = add(processor, "hello", "scored", prompt_logprobs=1)
    beyond = msgspec.structs.replace(right, first_position=10**6)
    processor.process(StepOutput(prompt_logprobs={more[0].request_id: beyond}))
    processor.refresh(scored)
    assert scored.error is not None and processor.abort("good") == ids[:1]


def test_a_request_that_is_refused_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = make_processor()

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr("nanoflow.engine.output.make_detokenizer", fail)
        with pytest.raises(RuntimeError, match="broken"):
            add(processor, "hello")
    assert not len(processor)
    add(processor, "hello")


def test_times_are_spans_between_events() -> None:
    now = [10.0]
    processor, observer = make_processor(lambda: now[0]), Recorder()
    processor.observer = observer
    output, requests = add(processor, "hello", max_tokens=3)
    (engine_id,) = [request.request_id for request in requests]
    assert requests[0].arrival_s == 10.0
    end = {engine_id: Finished(reason=FinishReason.LENGTH)}
    for now_s, step in (
        (11.0, StepOutput(scheduled={engine_id: 0})),
        (13.0, StepOutput(request_ids=[engine_id], token_ids=[5])),
        (14.0, StepOutput(request_ids=[engine_id], token_ids=[5], preempted=[engine_id])),
        (17.0, StepOutput(request_ids=[engine_id], token_ids=[5], finished=end)),
    ):
        now[0] = now_s
        list(processor.process(step))
    (summary,) = observer.finished
    assert (summary.queue_s, summary.prefill_s, summary.decode_s, summary.inference_s) == (1.0, 2.0, 4.0, 6.0)
    assert (summary.e2e_s, summary.tpot_s, summary.num_preemptions) == (7.0, 2.0, 1)
    assert (observer.ttft_s, observer.itl_s) == ([3.0], [1.0, 3.0])
    assert output.metrics is not None and output.metrics.finished_s == 17.0


# The border


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([5] * MAX_MODEL_LEN, f"the prompt has {MAX_MODEL_LEN} tokens; at most {MAX_MODEL_LEN - 1} fit"),
        ([VOCAB_SIZE], f"token id {VOCAB_SIZE} is out of vocabulary"),
        ([-1], "token id -1 is out of vocabulary"),
        ([10**30], "out of vocabulary"),
        ([1.5], "integers, got float"),
        ([True], "integers, got bool"),
        (7, "a string or a list of token ids, got int"),
        (b"x", "got bytes"),
        ({"prompt": [1]}, "'prompt' of a prompt cannot be a list"),
        ({"prompt_token_ids": "x"}, "'prompt_token_ids' of a prompt cannot be a str"),
        ({"text": "x"}, "got 'text'"),
        ({}, "got nothing"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_bad_prompts_are_refused_with_one_line(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(make_processor(), prompt)


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": [VOCAB_SIZE]},
        {"logit_bias": {VOCAB_SIZE: 1.0}},
        {"stop_token_ids": ["x"]},
        {"logit_bias": {"x": 1.0}},
    ],
)
def test_bad_token_ids_in_params_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"vocabulary|integers"):
        add(make_processor(), "hello", **params)


def test_what_is_wrong_is_said_of_the_request() -> None:
    """A mistake of whoever sent it, and of nobody else: another ValueError is no RequestError."""
    for params in ({"stop_token_ids": [VOCAB_SIZE]}, {"allowed_token_ids": [VOCAB_SIZE]}, {"logit_bias": {-1: 1.0}}):
        with pytest.raises(RequestError, match=f"^{next(iter(params))}: token id .* is out of vocabulary"):
            add(make_processor(), "hello", **params)
    with pytest.raises(RequestError, match="must be SamplingParams, got "):
        make_processor().add("a", Prompt(text=None, token_ids=[5]), {"n": 2})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"min_tokens": 1, "allowed_token_ids": [EOS_ID]}, "none is left"),
        ({"min_tokens": 1, "allowed_token_ids": [7, EOS_ID], "stop_token_ids": [7]}, "none is left"),
    ],
)
def test_allowed_tokens_of_which_none_is_left_are_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        add(make_processor(), "hello", **params)
    add(make_processor(), "hello", **{**params, "min_tokens": 0})


def test_bad_words_are_read_as_they_begin_a_text_and_behind_a_space() -> None:
    _, requests = add(make_processor(), "hello", n=2, bad_words=["hello", " world", "hello", "\t"])
    expected = [TOKENIZER.encode(form, add_special_tokens=False) for form in ("hello", " hello", "world", " world")]
    assert requests[0].bad_word_ids == requests[1].bad_word_ids == (*map(tuple, expected), (TOKENIZER.encode("\t")[0],))
    with pytest.raises(
        RequestError, match=rf"^bad_words: '.*' has \d+ tokens; there may be 1 to {MAX_BAD_WORD_TOKENS}"
    ):
        add(make_processor(), "hello", bad_words=["x" * (MAX_BAD_WORD_TOKENS + 1)])
    with pytest.raises(RequestError, match="no tokenizer: bad_words"):
        OutputProcessor(fake_facts(), None).add(
            "a", Prompt(text=None, token_ids=[5]), SamplingParams(detokenize=False, bad_words=["a"])
        )


def test_the_forms_of_a_prompt() -> None:
    ids = TOKENIZER.encode("hello")
    texts: list[PromptInput] = ["hello", {"prompt": "hello"}]
    assert all(read_prompt(form, TOKENIZER) == Prompt(text="hello", token_ids=ids) for form in texts)
    tokens: list[PromptInput] = [ids, tuple(ids), {"prompt_token_ids": ids}]
    tokens.append([np.int64(token_id) for token_id in ids])  # type: ignore[misc]
    assert all(read_prompt(form, None) == Prompt(text=None, token_ids=ids) for form in tokens)
    assert {type(token_id) for token_id in read_prompt(tokens[-1], None).token_ids} == {int}


def test_without_tokenizer_only_tokens_are_served() -> None:
    processor = OutputProcessor(fake_facts(), None)
    with pytest.raises(ValueError, match="no tokenizer"):
        read_prompt("hello", None)
    with pytest.raises(ValueError, match="detokenize=False"):
        processor.add("a", Prompt(text=None, token_ids=[5]), SamplingParams())
    processor.add("a", Prompt(text=None, token_ids=[5]), SamplingParams(detokenize=False))


def test_a_living_request_id_is_refused() -> None:
    processor = make_processor()
    add(processor, "hello")
    with pytest.raises(ValueError, match="already there"):
        add(processor, "hello")
    processor.abort("a")
    add(processor, "hello")
