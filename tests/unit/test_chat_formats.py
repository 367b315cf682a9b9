"""What a parser finds in a message, whole and in pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.chat_formats.choice import choose_format
from nanoflow.chat_formats.events import CallStarted, ContentDelta, Event
from nanoflow.chat_formats.formats import CALLS, REASONING, ChatFormat
from nanoflow.chat_formats.json_scan import JsonScan
from nanoflow.chat_formats.markers import Markers
from nanoflow.chat_formats.names import CALL_NAMES, REASONING_NAMES
from nanoflow.chat_formats.parser import ChatParser
from nanoflow.chat_formats.tagged import value_of
from nanoflow.config import ConfigError, ServerConfig
from nanoflow.option_names import from_kwargs
from tests.chat_texts import CASES, FORMATS, NAMES, PARAMETERS, PIECES, SUM, THINKS_HERMES, Found, found

# Text that JSON escapes, or that looks like its structure.
_CHARS = 'a"\\/é🌧\n\x01 {}[],:'


def read(form: ChatFormat, pieces: list[str], **options: object) -> list[Event]:
    given = {"names": NAMES, "parameters": PARAMETERS, **options}
    parser = ChatParser(form, new_id=lambda style: f"id of {style.name}", **given)  # type: ignore[arg-type]
    return [*(event for piece in pieces for event in parser.push(piece)), *parser.finish()]


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("case", CASES)
def test_what_is_found(case: str) -> None:
    form, text, expected = CASES[case]
    assert found(read(FORMATS[form], [text])) == expected


@pytest.mark.parametrize("case", CASES)
def test_every_cut_and_every_character_alone_give_the_same(case: str) -> None:
    form, text, expected = CASES[case]
    assert found(read(FORMATS[form], list(text))) == expected
    for place in range(1, len(text)):
        assert found(read(FORMATS[form], [text[:place], text[place:]])) == expected, text[:place]


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    parts=st.lists(st.sampled_from(PIECES), max_size=14),
    places=st.lists(st.integers(0, 400), max_size=12),
    names=st.sampled_from([NAMES, ()]),
    max_calls=st.sampled_from([None, 1]),
)
def test_random_texts_give_the_same_however_they_are_cut(
    form: str, parts: list[str], places: list[int], names: tuple[str, ...], max_calls: int | None
) -> None:
    text = "".join(parts)
    options = {"names": names, "hidden": ("<eos>", "<|end|>", "[TOOL_CALLS]"), "max_calls": max_calls}
    whole = found(read(FORMATS[form], [text], **options))
    assert found(read(FORMATS[form], cut(text, places), **options)) == whole
    assert found(read(FORMATS[form], list(text), **options)) == whole
    for _, arguments, is_whole in whole.calls:
        if is_whole:
            json.loads(arguments)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES), max_size=12))
def test_without_functions_all_text_is_content(parts: list[str]) -> None:
    text = "".join(parts)
    assert found(read(ChatFormat(calls=CALLS["hermes"]), [text], names=())) == Found(text)


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(_CHARS),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(_CHARS), inner),
        max_leaves=8,
    ),
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
    places=st.lists(st.integers(0, 300), max_size=5),
)
def test_the_scan_of_a_value_ends_where_the_value_ends(
    value: object, indent: int | None, is_ascii: bool, places: list[int]
) -> None:
    text = json.dumps([value], indent=indent, ensure_ascii=is_ascii)
    scan, seen, end = JsonScan(), "", 0
    for piece in cut(text + "} rest", places):
        seen += piece
        end = scan.advance(seen, end)
    assert scan.is_done and not scan.is_broken and seen[:end] == text


@pytest.mark.parametrize(
    "text",
    ['{"a" 1}', "{1: 2}", '{"a": 01}', '["\\x"]', '["\n"]', "[1,]", "[nul]", "[1 2]", '["\\u12g4"]', "{]", "?", "}"],
)
def test_the_scan_finds_what_is_no_json(text: str) -> None:
    scan = JsonScan()
    scan.advance(text, 0)
    assert scan.is_broken and not scan.is_done
    with pytest.raises(ValueError):
        json.loads(text)


def test_text_is_passed_on_as_soon_as_it_cannot_begin_a_mark() -> None:
    parser = ChatParser(THINKS_HERMES, names=NAMES)
    assert parser.push("Hello") == [ContentDelta("Hello")]
    assert parser.push(" <tool") == []
    assert parser.push("box> ") == [ContentDelta(" <toolbox>")]
    assert parser.push("<tool_call>") == []
    (started,) = parser.push('{"name": "add", "arguments": ') + parser.push("{")[:1]
    assert isinstance(started, CallStarted) and started.name == "add"
    assert found([started, *parser.push('"a'), *parser.push('": 1}'), *parser.push("}")]).calls == (
        ("add", '"a": 1}', True),
    )


def test_ids_are_as_openai_has_them_and_nine_characters_for_mistral() -> None:
    def call_id(case: str) -> str:
        form, text, _ = CASES[case]
        return next(
            event.call_id
            for event in ChatParser(FORMATS[form], names=NAMES).push(text)
            if isinstance(event, CallStarted)
        )

    assert call_id("hermes two calls").startswith("call_")
    assert len(call_id("mistral list")) == 9 and call_id("mistral list").isalnum()
    assert call_id("mistral list") != call_id("mistral list")
    assert call_id("kimi") == "functions.get_weather:0", "the model's own"


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("5", {"type": ["string", "null"]}, '"5"'),
        ("null", {"type": ["string", "null"]}, "null"),
        ("5", {"type": "integer"}, "5"),
        ("5", None, "5"),
        ("five", {"type": "integer"}, '"five"'),
        ("False", {"type": "boolean"}, "false"),
        ("NaN", {"type": "number"}, '"NaN"'),
        (' {"a": [1]} ', {"anyOf": [{"type": "object"}, {"type": "null"}]}, '{"a": [1]}'),
        ("1", {"enum": ["1", "2"]}, '"1"'),
    ],
)
def test_values_between_tags_are_of_the_type_of_their_schema(text: str, schema: object, expected: str) -> None:
    assert value_of(text, schema) == expected


@pytest.mark.parametrize("form", ["hermes", "mistral", "deepseek_v31", "openai"])
def test_calls_after_the_most_that_are_wanted_are_dropped(form: str) -> None:
    case = {
        "hermes": "hermes two calls",
        "mistral": "mistral heads",
        "deepseek_v31": "deepseek v3.1",
        "openai": "harmony to in front",
    }[form]
    _, text, expected = CASES[case]
    only = found(read(FORMATS[form], [text], max_calls=1))
    assert only == Found(expected.content, expected.reasoning, expected.calls[:1])


def test_special_tokens_are_left_out_of_texts() -> None:
    text = '<think>a<eos>b</think>c<eos>d <tool_call>{"name": "rm"} <eos>'
    events = read(THINKS_HERMES, [text], hidden=("<eos>", "<tool_call>"))
    assert found(events) == Found('cd {"name": "rm"} ', "ab")


@pytest.mark.parametrize(
    "is_reasoning, text, expected",
    [
        (True, "hm</think>\n\nHi", Found("Hi", "hm")),
        (True, "<think>hm</think>Hi", Found("Hi", "hm")),
        (False, "hm</think>Hi", Found("hm</think>Hi")),
        (None, "hm</think>Hi", Found("hm</think>Hi")),
        (True, "hm", Found("", "hm")),
        (
            True,
            'x<tool_call>{"name": "add"}</tool_call></think><tool_call>{"name": "add"}</tool_call>',
            Found("", 'x<tool_call>{"name": "add"}</tool_call>', (SUM,)),
        ),
    ],
)
def test_the_prompt_may_have_opened_the_reasoning(is_reasoning: bool | None, text: str, expected: Found) -> None:
    assert found(read(THINKS_HERMES, list(text), is_reasoning=is_reasoning)) == expected


def test_deepseek_r1_reasons_first_unless_the_prompt_says_otherwise() -> None:
    form = FORMATS["deepseek_v3"]
    assert found(read(form, ["hm</think>Hi"])) == Found("Hi", "hm")
    assert found(read(form, ["Hi"], is_reasoning=False)) == Found("Hi")


@pytest.mark.parametrize(
    "words, calls, reasoning",
    [
        ("<tool_call> <think></think>", "hermes", "qwen3"),
        ("<tool_call><function=", None, None),
        ("<tool_call><function=<parameter=", "qwen3_coder", None),
        ("<tool_call><arg_key></think>", "glm45", "qwen3"),
        ("<|tool_calls_section_begin|>", "kimi_k2", None),
        ("<seed:tool_call><function=</seed:think>", "seed_oss", "seed_oss"),
        ("[TOOL_CALLS]", "mistral", None),
        ("[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ('<|start_header_id|> {"name": n, "parameters": p}', "llama3_json", None),
        ("<｜tool▁calls▁begin｜>```json </think>", "deepseek_v3", "qwen3"),
        ("<｜tool▁calls▁begin｜> </think>", "deepseek_v31", "qwen3"),
        ("plain", None, None),
    ],
)
def test_a_format_is_found_from_the_words_of_a_template(words: str, calls: str | None, reasoning: str | None) -> None:
    named = choose_format("", calls or "none", reasoning or "none")
    assert choose_format(words) == named
    assert named.is_plain == (calls is None and reasoning is None)


@pytest.mark.parametrize("name", ["tool_call_parser", "reasoning_parser"])
def test_a_format_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be one of auto, none, .*, got 'pythonic'"):
        from_kwargs(ServerConfig, {name: "pythonic"})


def test_every_name_means_a_format() -> None:
    assert {*CALL_NAMES.values()} == {*CALLS, "openai"} and {*REASONING_NAMES.values()} == {*REASONING, "openai_gptoss"}


def test_either_name_chooses_the_channels_of_harmony() -> None:
    both = choose_format("<|channel|><|message|>")
    assert both == FORMATS["openai"] == choose_format("", "openai", "openai_gptoss")
    assert choose_format("", "none", "openai_gptoss").channels == both.channels
    assert choose_format("<|channel|><|message|>", "none").calls is None


def test_a_mark_that_begins_another_is_told_from_it() -> None:
    """Also in the middle of it, and where a shorter mark stands inside a longer one."""
    found_by = Markers(["ab", "abcd", "bc"])
    assert found_by.find("xab", is_end=False) == (1, None)
    assert found_by.find("xab", is_end=True) == (1, "ab")
    assert found_by.find("xabc", is_end=False) == (1, None)
    assert found_by.find("xabce", is_end=False) == (1, "ab")
    assert found_by.find("xabcd", is_end=False) == (1, "abcd")
    assert found_by.find("xbcx", is_end=False) == (1, "bc")
    assert Markers([]).find("abc", is_end=False) == (3, None)
