"""Stop strings that name special tokens: found where the token stands, though the text leaves it out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import read_prompt
from nanoflow.engine.stop_special import StopRules
from nanoflow.outputs import CompletionOutput, FinishReason
from nanoflow.request import SamplingParams
from tests.fake_engine import FakeEngine, fake_facts
from tests.toy_tokenizers import byte_fallback_backend, byte_level_backend, metaspace_backend, toy_tokenizer

IM_END, TURN = "<|im_end|>", "<|a b|>"
BACKENDS = {
    "byte-level": byte_level_backend,
    "byte-fallback": byte_fallback_backend,
    "metaspace": metaspace_backend,
}


def complete(kind: str, prompt: str, **params: Any) -> tuple[CompletionOutput, list[str]]:
    """The completion, which repeats the prompt, and its text whenever it was looked at."""
    backend = BACKENDS[kind]()
    backend.add_special_tokens([IM_END, TURN])
    tokenizer = toy_tokenizer(backend)
    processor, engine = OutputProcessor(fake_facts(), tokenizer), FakeEngine()
    prompt_ids = read_prompt(prompt, tokenizer)
    output, requests = processor.add("a", prompt_ids, SamplingParams(max_tokens=60, temperature=0, **params))
    engine.add(requests[0])
    shown = []
    while engine.has_work:
        processor.process(engine.step())
        processor.refresh(output)
        shown.append(output.outputs[0].text)
        engine.abort(processor.take_stopped())
    return output.outputs[0], shown


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", [IM_END, TURN])
def test_a_special_token_stops(kind: str, skips: bool, keeps: bool, name: str) -> None:
    completion, shown = complete(
        kind,
        f"hello{name}hello",
        stop=[name, "zzz"],
        skip_special_tokens=skips,
        include_stop_str_in_output=keeps,
    )
    assert completion.text.strip() == ("hello" + name if keeps else "hello")
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, name)
    assert all(completion.text.startswith(text) for text in shown)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(("stop", "text"), [(f"lo{IM_END}", "hel"), (f"{IM_END}h", "hello"), (f"lo{IM_END}he", "hel")])
def test_a_stop_string_may_have_a_special_token_inside(skips: bool, stop: str, text: str) -> None:
    completion, shown = complete("byte-level", f"hello{IM_END}hello", stop=stop, skip_special_tokens=skips)
    assert (completion.text, completion.stop_reason) == (text, stop)
    assert all(text.startswith(piece) for piece in shown)
    kept, _ = complete(
        "byte-level",
        f"hello{IM_END}hello",
        stop=stop,
        skip_special_tokens=skips,
        include_stop_str_in_output=True,
    )
    assert kept.text == text + stop


def test_a_token_that_is_left_out_does_not_part_a_stop_string() -> None:
    completion, _ = complete("byte-level", f"hel{TURN}lo world", stop=["hello", IM_END])
    assert (completion.text, completion.stop_reason) == ("", "hello")


def test_what_names_no_token_whole_is_searched_in_the_text_alone() -> None:
    completion, _ = complete("byte-level", f"hel{IM_END}lo>", stop=[">", "|im"])
    assert (completion.text, completion.stop_reason) == ("hello", ">")


def test_a_name_that_other_tokens_spell_stops_too() -> None:
    rules = StopRules([IM_END], {IM_END: 7})
    stops = rules.new_filter()
    assert "".join(map(stops.push, "ab<|im_end|>")) == "ab" and stops.found == IM_END


def test_min_tokens_lets_an_early_one_pass() -> None:
    completion, _ = complete("byte-level", f"h{IM_END}h", stop=IM_END, min_tokens=3)
    assert completion.text == "hhh" and len(completion.token_ids) == 5


def test_requests_without_such_names_have_no_marks() -> None:
    assert not StopRules(["a", "<|im_"], {IM_END: 7}).marks


NAMES = {"A": 1, "AB": 2, "C": 3}


@given(
    pieces=st.lists(st.sampled_from([*"xyAC", "<A>", "<AB>", "<C>"]), max_size=12),
    stops=st.lists(st.text("xyABC", min_size=1, max_size=4), min_size=1, max_size=3),
    keeps=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_the_earliest_is_found_as_by_brute_force(pieces: list[str], stops: list[str], keeps: bool) -> None:
    """Tokens are pieces of text, or special tokens, written "<A>" here, that the text leaves out."""
    rules = StopRules(stops, NAMES)
    stop_filter, shown = rules.new_filter(keeps_stop=keeps), ""
    for piece in pieces:
        shown += stop_filter.push(rules.marks.get(NAMES[piece[1:-1]], "") if piece[0] == "<" else piece)
        if stop_filter.found:
            break
    shown += stop_filter.flush()
    expected, found = _brute_force(pieces, stops)
    assert stop_filter.found == found
    assert shown == (expected + found if keeps and found else expected)


def _brute_force(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, of those the longest; special tokens are one symbol."""
    marks = {"<A>": "1", "<AB>": "2", "<C>": "3"}
    named = {stop: stop.replace("AB", "2").replace("A", "1").replace("C", "3") for stop in stops}
    relevant = set("".join(named.values())) if any(mark in "".join(named.values()) for mark in "123") else set()
    visible, marked = "", ""
    for piece in pieces:
        symbol = marks.get(piece, piece)
        visible += "" if piece in marks else symbol
        if piece not in marks or symbol in relevant:
            marked += symbol
        ends = [stop for stop in stops if piece not in marks and visible.endswith(stop)]
        ends += [stop for stop, name in named.items() if name != stop and marked.endswith(name)]
        if ends:
            found = max(ends, key=len)
            hidden = max(_num_visible(named[stop], stop, visible) for stop in ends if stop == found)
            return visible[: len(visible) - hidden], found
    return visible, None


def _num_visible(name: str, stop: str, visible: str) -> int:
    return len(stop) if visible.endswith(stop) else sum(symbol not in "123" for symbol in name)
