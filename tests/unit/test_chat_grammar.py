"""Grammars of required calls: what they are as text, what they let through, and that the parser reads that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanoflow.chat_formats.choice import choose_format
from nanoflow.chat_formats.grammar import answer_grammar, blamed, grammar_of
from nanoflow.chat_formats.parser import ChatParser
from nanoflow.chat_formats.tools import Calling, ToolChoice
from nanoflow.engine.grammar_process import answer
from nanoflow.parameters import RequestError
from nanoflow.structured import read_structured
from tests.chat_texts import FORMATS, Found, found

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
STOP = {"type": "function", "function": {"name": "stop"}}
# Not in an id.
_WRONG_VALUE = ("1", '"1"', 1)
REQUIRED = ToolChoice(Calling.REQUIRED)
ONE, TWO = ("add", '{"a": 1}', True), ("stop", "{}", True)

TEXTS = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "add", "parameters": {"a": 1}}; {"name": "stop", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "stop", "arguments": {}}]',
    "deepseek_v3": "</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "openai": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}',
    "qwen3_coder": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=stop>\n</function>\n</tool_call>",
    "glm45": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>\n"
    "<tool_call>stop\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
}
TEXTS["seed_oss"] = TEXTS["qwen3_coder"].replace("tool_call>", "seed:tool_call>")


def lets_through(grammar: str | None, text: str) -> bool:
    """True if the grammar takes the whole text and may end there."""
    llguidance = pytest.importorskip("llguidance")
    assert grammar is not None
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


@pytest.mark.parametrize("form", FORMATS)
def test_a_grammar_lets_through_what_the_parser_reads(form: str) -> None:
    grammar, text = grammar_of(FORMATS[form], [ADD, STOP], REQUIRED), TEXTS[form]
    assert lets_through(grammar, text)
    parser = ChatParser(FORMATS[form], names=("add", "stop"))
    calls = (ONE,) if form == "openai" else (ONE, TWO)
    assert found([*parser.push(text), *parser.finish()]) == Found("", "hm" if form == "openai" else "", calls)
    for wrong in ("", "no", text.replace(*_WRONG_VALUE), text.replace("add", "rm")):
        assert not lets_through(grammar, wrong), wrong


def test_one_call_and_a_named_function() -> None:
    form, text = FORMATS["hermes"], TEXTS["hermes"]
    first = text[: text.index("</tool_call>") + len("</tool_call>")]
    one = grammar_of(form, [ADD, STOP], REQUIRED, is_parallel=False)
    assert lets_through(one, first) and not lets_through(one, text)
    named = grammar_of(form, [ADD, STOP], ToolChoice(Calling.REQUIRED, "add"))
    assert lets_through(named, first) and not lets_through(named, text)


@pytest.mark.parametrize(
    "is_reasoning, before, is_let_through",
    [
        (None, "", True),
        (None, "<think>hm <b></think>\n\n", True),
        (None, "hm</think>", False),
        (True, "hm</think>\n\n", True),
        (True, "", False),
        (False, "", True),
        (False, "<think>hm</think>", False),
    ],
)
def test_reasoning_may_come_before_a_call(is_reasoning: bool | None, before: str, is_let_through: bool) -> None:
    grammar = grammar_of(FORMATS["hermes"], [ADD, STOP], REQUIRED, is_reasoning=is_reasoning)
    assert lets_through(grammar, before + TEXTS["hermes"]) == is_let_through


def test_special_tokens_are_written_by_their_ids() -> None:
    special = {"[TOOL_CALLS]": 5, "[ARGS]": 32, "<s>": 1}
    grammar = grammar_of(FORMATS["mistral"], [STOP], REQUIRED, special=special)
    assert grammar is not None
    lines = grammar.splitlines()
    assert 'message_0: <[5]> "[" call_0 (", " call_0)* "]"' in lines
    assert 'call_1: <[5]> "stop" <[32]> arguments_0 ""' in lines
    assert "<[1]>" not in grammar and "TOOL_CALLS" not in grammar


def test_what_needs_no_grammar_has_none() -> None:
    for choice in (ToolChoice(), ToolChoice(Calling.NONE)):
        assert grammar_of(FORMATS["hermes"], [ADD], choice) is None
    assert grammar_of(choose_format("plain"), [ADD], REQUIRED) is None


def test_a_schema_keeps_its_words() -> None:
    grammar = grammar_of(FORMATS["hermes"], [ADD], REQUIRED)
    assert grammar is not None
    (line,) = (line for line in grammar.splitlines() if line.startswith("arguments_0: %json "))
    assert {**json.loads(line.partition("%json ")[2]), "x-guidance": None} == {**SCHEMA, "x-guidance": None}


STRICT = {"type": "function", "function": {**ADD["function"], "strict": True}}
AUTO = ToolChoice()
FINAL = {"openai": "<|channel|>final<|message|>"}


@pytest.mark.parametrize("form", FORMATS)
def test_a_strict_function_is_held_where_the_model_decides(form: str) -> None:
    """Text is free up to the mark of a call; from there on the call is one of a declared function, by its schema."""
    grammar = grammar_of(FORMATS[form], [STRICT, STOP], AUTO, is_reasoning=False)
    text = TEXTS[form].removeprefix("</think>\n\n")
    is_bare, final = form == "llama3_json", FINAL.get(form, "")
    assert lets_through(grammar, text)
    assert lets_through(grammar, f"{final}Hello <, [ and so on.")
    if not is_bare and not final:
        assert lets_through(grammar, f"I look. {text}") and lets_through(grammar, f"I look. {text} Done.")
    for wrong in (text.replace(*_WRONG_VALUE), text.replace("add", "rm"), text.replace("add", "ad")):
        assert not lets_through(grammar, wrong), wrong
        assert not lets_through(grammar, f"{text}{wrong}"), wrong


def test_functions_that_are_not_strict_take_any_arguments_beside_strict_ones() -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": SCHEMA}}
    grammar, call = grammar_of(FORMATS["hermes"], [STRICT, other], AUTO), TEXTS["hermes"].partition("\n<tool")[0]
    loose = call.replace('"a"', '"b"')
    assert lets_through(grammar, call.replace("add", "other")) and lets_through(grammar, loose.replace("add", "other"))
    assert lets_through(grammar, call) and not lets_through(grammar, loose)
    assert grammar_of(FORMATS["hermes"], [ADD, STOP], AUTO) is None
    assert grammar_of(FORMATS["hermes"], [STRICT], ToolChoice(Calling.NONE)) is None


def test_strict_calls_one_at_most_after_reasoning_and_beside_an_answer_with_a_schema() -> None:
    form, text = FORMATS["hermes"], TEXTS["hermes"]
    call = text.partition("\n<tool")[0]
    one = grammar_of(form, [STRICT, STOP], AUTO, is_parallel=False)
    assert lets_through(one, f"a{call}b") and not lets_through(one, f"a{text}")
    thinking = grammar_of(form, [STRICT, STOP], AUTO, is_reasoning=True)
    assert lets_through(thinking, f"hm <tool_call> hm</think>\n\nI look.{text}")
    assert not lets_through(thinking, "hm </think>\n\nI look.<tool_call> hm")
    shaped = grammar_of(form, [STRICT], AUTO, answer={"type": "object", "properties": {"x": {"type": "integer"}}})
    assert lets_through(shaped, call) and lets_through(shaped, '{"x": 1}')
    assert not lets_through(shaped, '{"x": "1"}') and not lets_through(shaped, "text")
    beside = grammar_of(form, [ADD], AUTO, answer=SCHEMA)
    assert lets_through(beside, call.replace('"a"', '"b"')) and not lets_through(beside, "text"), "not strict"
    assert grammar_of(form, [ADD], ToolChoice(Calling.NONE), answer=SCHEMA) is None


def test_no_mark_of_the_format_is_free_text() -> None:
    grammar = grammar_of(FORMATS["deepseek_v31"], [STRICT, STOP], AUTO)
    assert lets_through(grammar, f"text {TEXTS['deepseek_v31']}")
    assert not lets_through(grammar, f"<｜tool▁call▁begin｜>rm<｜tool▁sep｜>{{}}{TEXTS['deepseek_v31']}")


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        ({"json": SCHEMA}, '{"a": 1}', '{"a": ""}'),
        ({"regex": r"a/b\/[^/]\\"}, "a/b/c\\", "a/b///"),
        ({"choice": ["yes", 'n"o', *map(str, range(3000))]}, 'n"o', "n"),
    ],
)
def test_an_answer_with_a_shape_comes_behind_reasoning(shape: dict[str, Any], good: str, bad: str) -> None:
    structured = read_structured("structured_outputs", shape)
    assert structured is not None
    opened = answer_grammar(FORMATS["hermes"], structured, is_reasoning=True)
    for text, is_right in ((f"hm</think>\n\n{good}", True), (good, False), (f"hm</think>{bad}", False)):
        assert lets_through(opened, text) == is_right, text
    either = answer_grammar(FORMATS["hermes"], structured)
    assert lets_through(either, good) and lets_through(either, f"<think>hm</think>{good}")
    harmony = answer_grammar(FORMATS["openai"], structured)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert lets_through(harmony, f"{thought}<|channel|>final<|message|>{good}") and not lets_through(harmony, good)
    assert answer_grammar(FORMATS["hermes"], structured, is_reasoning=False) is None
    assert answer_grammar(FORMATS["mistral"], structured) is not None
    assert answer_grammar(FORMATS["kimi_k2"], structured) is None
    grammar = read_structured("structured_outputs", {"grammar": "start: /a/"})
    assert grammar is not None and answer_grammar(FORMATS["hermes"], grammar) is None


def test_marks_that_are_tokens_are_no_free_text() -> None:
    grammar = grammar_of(FORMATS["mistral"], [STRICT], AUTO, special={"[TOOL_CALLS]": 5, "[ARGS]": 32})
    assert grammar is not None and "upto_0: FREE <[5]>" in grammar.splitlines()
    assert lets_through(grammar, "text") and not lets_through(grammar, "text [TOOL_CALLS] text")


def test_members_between_tags_are_held_to_their_types() -> None:
    properties = {
        "city": {"type": "string"},
        "zip": {"enum": ["01", 2]},
        "far": {"$ref": "#/$defs/far"},
        "any": {},
        "opt": {"type": "array", "items": {"type": "integer"}},
    }
    schema = {
        "properties": properties,
        "required": ["city", "zip", "far", "any"],
        "$defs": {"far": {"type": "boolean"}},
    }
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    grammar = grammar_of(FORMATS["qwen3_coder"], [tool], REQUIRED)

    def call(**members: str) -> str:
        written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in members.items())
        return f"<tool_call>\n<function=add>\n{written}</function>\n</tool_call>"

    good = {"city": 'a "b"\n</p>', "zip": "01", "far": "true", "any": "x", "opt": "[1]"}
    assert lets_through(grammar, call(**good)) and lets_through(grammar, call(**{**good, "zip": "2"}))
    assert lets_through(grammar, call(**{key: value for key, value in good.items() if key != "opt"}))
    for wrong in ({"zip": "1"}, {"far": "1"}, {"opt": "[x]"}):
        assert not lets_through(grammar, call(**{**good, **wrong})), wrong
    assert not lets_through(grammar, call(**{key: value for key, value in good.items() if key != "city"}))


def test_any_names_of_members_between_tags_and_no_schemas() -> None:
    """Also names that look like the table's own; what is no schema is refused where grammars are compiled."""

    def of(**parameters: Any) -> str | None:
        tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
        return grammar_of(FORMATS["qwen3_coder"], [tool], REQUIRED)

    call = "<tool_call>\n<function=add>\n<parameter={value}>\n1\n</parameter>\n</function>\n</tool_call>"
    assert lets_through(of(properties={"{value}": {"type": "integer"}}), call)
    only_required = of(properties={}, required=["{value}"])
    assert lets_through(only_required, call) and not lets_through(only_required, call.replace("{value}", "b"))
    wrong: dict[str, Any]
    for wrong in ({"required": 5}, {"required": [[]]}, {"properties": {"a": {"enum": 5}}}):
        with pytest.raises(AssertionError, match=r"array|string"):
            lets_through(of(**wrong), call)


@pytest.mark.parametrize("form", ["hermes", "glm45", "openai"])
def test_an_error_of_a_schema_names_its_function(form: str) -> None:
    """Not the line of a grammar that its sender has never seen."""
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"properties": {"a": {"type": "nonsense"}}}}}
    for choice, tools in ((REQUIRED, [ADD, bad]), (ToolChoice(Calling.REQUIRED, "bad"), [STOP, bad])):
        grammar = grammar_of(FORMATS[form], tools, choice)
        assert grammar is not None
        said = answer(json.dumps({"kind": "grammar", "text": grammar}).encode())["error"]
        problem = blamed(grammar, RequestError(f"the grammar cannot be used: {said}"), tools, choice)
        assert str(problem) == "invalid schema for function 'bad': Invalid type: nonsense"
        assert (problem.param, problem.code) == ("tools[1].function.parameters", "invalid_function_parameters")
    other = RequestError("the grammar cannot be used: it takes too much memory")
    assert grammar is not None
    assert blamed(grammar, other, tools, choice) is other
