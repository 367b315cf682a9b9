"""Outputs while they grow: what an iteration costs, what waits until somebody reads it, where several tokens end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nanoflow.engine.messages import PlaceLogprobs, StepOutput
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.token_bytes import TokenBytes
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import Finished, FinishReason, Logprob
from tests.fake_engine import fake_facts
from tests.toy_tokenizers import EOS, byte_level_backend
from tests.unit.test_output import TOKENIZER, add, make_processor


class SpyTokenizer(Tokenizer):
    """Counts the tokens whose bytes are asked for."""

    num_looked_at = 0

    def token_bytes(self, *, skip_special_tokens: bool) -> TokenBytes:
        table = super().token_bytes(skip_special_tokens=skip_special_tokens)

        class Spy(TokenBytes):
            def __getitem__(_, token_id: int) -> bytes:
                self.num_looked_at += 1
                return table[token_id]

        return Spy(table.__getitem__)


def make_spied() -> tuple[OutputProcessor, SpyTokenizer]:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), eos_token=EOS)
    tokenizer = SpyTokenizer(fast)
    return OutputProcessor(fake_facts(), tokenizer), tokenizer


def test_an_iteration_makes_no_text_until_an_output_is_refreshed() -> None:
    processor, tokenizer = make_spied()
    output, (request,) = add(processor, "hello", max_tokens=100)
    tokenizer.num_looked_at = 0
    ids = TOKENIZER.encode(" world")
    for token_id in ids:
        grown = processor.process(StepOutput(request_ids=[request.request_id], token_ids=[token_id]))
        assert len(grown) == 1 and grown[0] is output
    assert (output.outputs[0].token_ids, output.outputs[0].text, tokenizer.num_looked_at) == (ids, "", 0)
    processor.refresh(output)
    assert (output.outputs[0].text, tokenizer.num_looked_at) == (" world", len(ids))
    processor.refresh(output)
    assert tokenizer.num_looked_at == len(ids)


@pytest.mark.parametrize("stop", [None, ["zzz", "worldworldworldX"]])
def test_a_token_costs_the_same_whatever_stands_before_it(stop: list[str] | None) -> None:
    """Counted in tokens looked at and characters added."""
    processor, tokenizer = make_spied()
    output, (request,) = add(processor, "hello", max_tokens=None, stop=stop)
    ids = TOKENIZER.encode("world, 漢字 ")

    def price(num_tokens: int) -> tuple[int, int]:
        tokenizer.num_looked_at, num_chars = 0, output.outputs[0].num_chars
        for i in range(num_tokens):
            processor.process(StepOutput(request_ids=[request.request_id], token_ids=[ids[i % len(ids)]]))
            processor.refresh(output)
        return tokenizer.num_looked_at, output.outputs[0].num_chars - num_chars

    first = price(10 * len(ids))
    processor.process(StepOutput(request_ids=[request.request_id] * 8000 * len(ids), token_ids=ids * 8000))
    processor.refresh(output)
    assert price(10 * len(ids)) == first
    assert first[0] == 10 * len(ids)


def test_an_output_of_several_completions_comes_once_an_iteration() -> None:
    processor = make_processor()
    output, requests = add(processor, "hello", n=3)
    ids = [request.request_id for request in requests]
    end = {ids[1]: Finished(reason=FinishReason.LENGTH)}
    grown = processor.process(StepOutput(request_ids=ids, token_ids=[5, 6, 7], finished=end))
    assert len(grown) == 1 and grown[0] is output
    assert [completion.is_finished for completion in output.outputs] == [False, True, False]
    assert output.outputs[1].text == TOKENIZER.decode([6])


def test_an_output_that_has_ended_is_not_refreshed_by_one_of_its_name() -> None:
    processor = make_processor()
    ended, _ = add(processor, "hello")
    processor.abort("a")
    output, (request,) = add(processor, "hello")
    processor.process(StepOutput(request_ids=[request.request_id], token_ids=TOKENIZER.encode("h")))
    processor.refresh(ended)
    assert (ended.outputs[0].text, output.outputs[0].text) == ("", "")
    processor.refresh(output)
    assert output.outputs[0].text == "h"


def test_an_aborted_output_has_the_text_of_its_tokens() -> None:
    processor = make_processor()
    output, (request,) = add(processor, "hello", logprobs=0)
    step = StepOutput(
        request_ids=[request.request_id],
        token_ids=TOKENIZER.encode("h"),
        logprobs={request.request_id: PlaceLogprobs(first_position=0, token_ids=[[7]], logprobs=[[-1.0]], ranks=[3])},
    )
    processor.process(step)
    processor.abort("a")
    assert output.outputs[0].text == "h"
    assert output.outputs[0].logprobs == [{7: Logprob(logprob=-1.0, rank=3, decoded_token=TOKENIZER.token_text(7))}]


@given(
    text=st.text("ab 漢", min_size=1, max_size=30),
    stops=st.lists(st.text("ab 漢", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 40)),
    min_tokens=st.integers(0, 20),
    keeps=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_several_tokens_an_iteration_end_where_single_ones_do(
    text: str, stops: list[str], cuts: list[int], min_tokens: int, keeps: bool
) -> None:
    ids = TOKENIZER.encode(text)
    every, some = range(len(ids)), [min(cut, len(ids)) for cut in cuts]
    results = []
    for borders in ([*every, len(ids)], [0, *sorted(some), len(ids)]):
        processor = make_processor()
        options: dict[str, Any] = {
            "stop": stops,
            "min_tokens": min_tokens,
            "include_stop_str_in_output": keeps,
            "logprobs": 0,
        }
        output, (request,) = add(processor, "x", max_tokens=None, **options)
        for start, end in itertools.pairwise(borders):
            tokens = ids[start:end]
            scores = PlaceLogprobs(
                first_position=0,
                token_ids=[[token_id] for token_id in tokens],
                logprobs=[[-float(token_id)] for token_id in tokens],
                ranks=[1] * len(tokens),
            )
            request_ids = [request.request_id] * len(tokens)
            step = StepOutput(request_ids=request_ids, token_ids=tokens, logprobs={request.request_id: scores})
            processor.process(step)
        is_stopped = output.finished
        processor.abort("a")
        completion = output.outputs[0]
        completion.finish_reason = FinishReason.STOP if is_stopped else None
        assert completion.cumulative_logprob == -sum(completion.token_ids)
        results.append((completion, is_stopped))
    assert results[0] == results[1]
    completion, is_stopped = results[0]
    if not is_stopped:
        assert (completion.token_ids, completion.text) == (ids, text)


def test_a_stop_string_wins_over_a_length_that_is_reached_with_it() -> None:
    processor = make_processor()
    output, (request,) = add(processor, "hello", stop="h")
    end = {request.request_id: Finished(reason=FinishReason.LENGTH)}
    processor.process(StepOutput(request_ids=[request.request_id], token_ids=TOKENIZER.encode("h"), finished=end))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, "h")
    assert processor.take_stopped() == []
