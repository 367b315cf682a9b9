"""Stop strings that name special tokens: found where the token stands, though the text leaves it out."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.config import ServerConfig
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import read_prompt
from nanoflow.engine.stop_special import StopRules
from nanoflow.outputs import CompletionOutput, FinishReason
from nanoflow.request import SamplingParams
from nanoflow.server.app import create_app
from tests.fake_engine import FakeEngine, fake_facts
from tests.local_engine import LocalEngine
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


def test_what_may_become_a_stop_string_behind_its_token_is_held_back() -> None:
    rules = StopRules([f"lo{IM_END}he"], {IM_END: 7})
    stops, mark = rules.new_filter(), rules.marks[7]
    assert [stops.push(piece) for piece in ("hel", "o", mark, "h", "x")] == ["he", "", "", "", "lohx"]
    assert [stops.push(piece) for piece in ("lo", mark, "h", "e")] == ["", "", "", ""] and stops.found
    open_end = rules.new_filter()
    assert open_end.push("lo" + mark) + open_end.flush() == "lo"


def test_min_tokens_lets_an_early_one_pass() -> None:
    completion, _ = complete("byte-level", f"h{IM_END}h", stop=IM_END, min_tokens=3)
    assert completion.text == "hhh" and len(completion.token_ids) == 5


def test_requests_without_such_names_have_no_marks() -> None:
    assert not StopRules(["a", "<|im_"], {IM_END: 7}).marks


@pytest.mark.parametrize("keeps", [True, False])
def test_over_http_whole_and_as_a_stream(keeps: bool) -> None:
    backend = byte_level_backend()
    backend.add_special_tokens([IM_END])
    app = create_app(LocalEngine(toy_tokenizer(backend)), ServerConfig(served_model_name="toy"))
    body = {"prompt": f"hello{IM_END}", "stop": [IM_END], "max_tokens": 40, "include_stop_str_in_output": keeps}
    text = "hello" + IM_END if keeps else "hello"
    (choice,) = asyncio.run(_post(app, body)).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", IM_END)
    lines = asyncio.run(_post(app, {**body, "stream": True})).text.split("\n\n")
    parts = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(part["text"] for part in parts) == text
    assert (parts[-1]["finish_reason"], parts[-1]["stop_reason"]) == ("stop", IM_END)


async def _post(app: FastAPI, body: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://toy") as client:
        return await client.post("/v1/completions", json=body)


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
            name = named[found]
            # Found as both, the one with the special token counts.
            is_special = name != found and marked.endswith(name)
            num_hidden = sum(symbol not in "123" for symbol in name) if is_special else len(found)
            return visible[: len(visible) - num_hidden], found
    return visible, None


def test_work_is_linear_in_the_text_with_marks_too() -> None:
    """What is held is not read again: 16 stop strings of 20,000 characters, of which the text is the beginning."""
    rules = StopRules([f"{'a' * 20_000}<end>{index}" for index in range(16)], {"<end>": 7})

    def cpu_s(num_pieces: int) -> float:
        search, begin_s = rules.new_filter(), time.thread_time()
        for _ in range(num_pieces):
            search.push("a")
        return time.thread_time() - begin_s

    cpu_s(16_000)
    short_s, long_s = (min(cpu_s(count) for _ in range(3)) for count in (1_000, 16_000))
    assert long_s < 16 * short_s * 4
