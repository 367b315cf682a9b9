"""Requests for structured output and tools, after what server tests of vLLM and SGLang try, and what has to come back.

  python -m benchmarks.robustness.server_cases                         all cases, with the embedded model
  python -m benchmarks.robustness.server_cases --model ./SmolLM2       with another model
  python -m benchmarks.robustness.server_cases --json benchmarks/results/server_cases.json

All requests are sent at once. It fails if a case does not pass that has to. The requests are our own, with the kinds
of shapes and the sequences of turns of these suites: https://github.com/vllm-project/vllm (tests/entrypoints,
tests/tool_use) and https://github.com/sgl-project/sglang (test/srt/openai_server).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.document import write_document
from benchmarks.robustness.server_case import (
    Case,
    Reply,
    both,
    calls,
    each,
    matches,
    read_reply,
    refused,
    text_alone,
    valid,
)
from nanoflow.cli.options import CommandParser
from nanoflow.config import DEFAULT_MODEL, EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.server.app import create_app

# Calls as Hermes and Qwen write them, behind plain text of messages.
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}\n{% endif %}"
    "{% for message in messages %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}\n{% endfor %}"
    "{% if enable_thinking is defined %}{{ '<think>\n' if enable_thinking else '<think>\n</think>\n' }}{% endif %}"
)
_COLOUR = {"type": "string", "enum": ["red", "green", "blue"]}
_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "skills": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "age", "skills"],
    "additionalProperties": False,
}
_NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "on": {"type": "string", "format": "date"},
        "colour": _COLOUR,
        "size": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2},
    },
    "required": ["id", "on", "colour", "size", "parts"],
    "additionalProperties": False,
    "$defs": {
        "part": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        }
    },
}
_IP = r"((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_EMAIL = r"[a-z]{3,9}@[a-z]{3,9}\.(com|org)"
_LANGUAGES = ["Python", "Rust", "C++"]
_SQL = """start: "select " column ", " column " from " table
column: "col_" /[1-9]/
table: "table_" /[1-9]/
"""
_DATE = 'root ::= year "-" two "-" two\nyear ::= [12] [0-9] [0-9] [0-9]\ntwo ::= [0-3] [0-9]\n'
_PHONE = 'root ::= "(" three ") " three "-" three\nthree ::= [0-9] [0-9] [0-9]\n'
_ASKED = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "A record, please."}]


def _schema_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "record", "schema": schema, "strict": True}}


def _text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "A record: ", "max_tokens": 150, "seed": 1, **fields}


def _chat(**fields: Any) -> dict[str, Any]:
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    return {"messages": _ASKED, "max_tokens": 150, "seed": 1, **quiet, **fields}


def _has_logprobs(reply: Reply) -> str | None:
    (choice,) = reply.body["choices"]
    entries = choice["logprobs"]["content"] if choice["logprobs"] else []
    return None if entries and all(len(entry["top_logprobs"]) == 5 for entry in entries) else "no log probabilities"


def _structured(name: str, body: Mapping[str, Any], check: Any, lacks: str | None = None) -> Case:
    return Case(name=name, area="structured output", body=body, check=check, lacks=lacks)


STRUCTURED = (
    _structured(
        "schema, completion, n = 2", _text(structured_outputs={"json": _PERSON}, n=2), each(valid(_PERSON), count=2)
    ),
    _structured("schema, chat", _chat(structured_outputs={"json": _PERSON}), each(valid(_PERSON))),
    _structured("schema, chat, stream", _chat(structured_outputs={"json": _PERSON}, stream=True), each(valid(_PERSON))),
    _structured("schema as text, older name", _text(guided_json=json.dumps(_PERSON)), each(valid(_PERSON))),
    _structured("response_format json_schema", _chat(response_format=_schema_format(_PERSON)), each(valid(_PERSON))),
    _structured(
        "response_format json_schema, nested, references, formats",
        _chat(response_format=_schema_format(_NESTED)),
        each(valid(_NESTED)),
    ),
    _structured(
        "response_format json_object",
        _chat(response_format={"type": "json_object"}, max_tokens=60, temperature=0.0, logit_bias={}),
        each(lambda message: None if message.text.lstrip().startswith("{") else message.text),
    ),
    _structured(
        "response_format json_object, stream",
        _chat(response_format={"type": "json_object"}, max_tokens=60, stream=True),
        each(lambda message: None if message.text.lstrip().startswith("{") else message.text),
    ),
    _structured("regex, completion, n = 3", _text(structured_outputs={"regex": _IP}, n=3), each(matches(_IP), count=3)),
    _structured("regex, chat", _chat(guided_regex=_IP), each(matches(_IP))),
    _structured("regex of an address", _chat(structured_outputs={"regex": _EMAIL}), each(matches(_EMAIL))),
    _structured(
        "choice, completion, n = 2",
        _text(structured_outputs={"choice": _LANGUAGES}, n=2),
        each(matches(r"Python|Rust|C\+\+"), count=2),
    ),
    _structured("choice, chat", _chat(guided_choice=_LANGUAGES), each(matches(r"Python|Rust|C\+\+"))),
    _structured(
        "choice, log probabilities",
        _chat(structured_outputs={"choice": _LANGUAGES}, logprobs=True, top_logprobs=5),
        both(each(matches(r"Python|Rust|C\+\+")), _has_logprobs),
    ),
    _structured(
        "grammar in Lark's format",
        _text(structured_outputs={"grammar": _SQL}),
        each(matches(r"select col_\d, col_\d from table_\d")),
    ),
    _structured("grammar in EBNF, a date", _chat(guided_grammar=_DATE), each(matches(r"[12]\d{3}-[0-3]\d-[0-3]\d"))),
    _structured(
        "grammar in EBNF, n = 2", _text(guided_grammar=_PHONE, n=2), each(matches(r"\(\d{3}\) \d{3}-\d{3}"), count=2)
    ),
    _structured("a value of the wrong type", _chat(structured_outputs={"regex": 5}), refused("structured_outputs")),
    _structured("two shapes", _chat(structured_outputs={"json": _PERSON, "regex": "a"}), refused("structured_outputs")),
    _structured(
        "a shape behind reasoning",
        _chat(
            structured_outputs={"regex": "yes|no"},
            chat_template_kwargs={"enable_thinking": True},
            thinking_token_budget=5,
        ),
        each(lambda message: None if message.reasoning and message.text in ("yes", "no") else str(message)),
    ),
    _structured(
        "structural_tag",
        _chat(
            response_format={
                "type": "structural_tag",
                "structures": [{"begin": "<f>", "schema": _PERSON, "end": "</f>"}],
                "triggers": ["<f>"],
            }
        ),
        each(lambda message: None if message.text else "no text"),
    ),
    _structured(
        "guided_whitespace_pattern",
        _chat(guided_json=_PERSON, guided_whitespace_pattern="[ ]?"),
        each(valid(_PERSON)),
        lacks="white space between the tokens of JSON cannot be set",
    ),
)

_WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
_SEARCH: dict[str, Any] = {
    "type": "object",
    "properties": {"term": {"type": "string", "maxLength": 8}},
    "required": ["term"],
    "additionalProperties": False,
}
_SCHEMAS = {"get_weather": _WEATHER, "search": _SEARCH}


def _tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": _SCHEMAS[name], **more}}


_TOOLS = [_tool("get_weather"), _tool("search")]
_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>'
# A model that knows of no tools writes a call if it has seen enough of them.
_COPIED = [{"role": "user", "content": "\n".join([_CALL] * 6)}]
_NAMED = {"type": "function", "function": {"name": "get_weather"}}


def _made(call_id: str, city: str) -> dict[str, Any]:
    arguments = json.dumps({"city": city, "unit": "C"})
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _turns(*cities: str) -> list[dict[str, Any]]:
    """A question, calls, and their results."""
    made = [_made(f"call_{place}", city) for place, city in enumerate(cities)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "It rains."} for call in made]
    return [*_ASKED, {"role": "assistant", "content": None, "tool_calls": made}, *results]


def _ask(**fields: Any) -> dict[str, Any]:
    return _chat(**{"tools": _TOOLS, **fields})


def _copy(**fields: Any) -> dict[str, Any]:
    plain = {"chat_template_kwargs": {}, "max_tokens": 60}
    return _ask(messages=_COPIED, temperature=0.0, **{**plain, **fields})


def _tools(name: str, body: Mapping[str, Any], check: Any, *, needs_copying: bool = False) -> Case:
    return Case(name=name, area="tools", body=body, check=check, needs_copying=needs_copying)


TOOLS = (
    _tools("no call where none is made", _ask(max_tokens=20), each(text_alone)),
    _tools("no tools", _chat(max_tokens=20, tools=None), each(text_alone)),
    _tools(
        "a call of the model's own",
        _copy(parallel_tool_calls=False),
        each(calls(_SCHEMAS, most=1, reason="length")),
        needs_copying=True,
    ),
    _tools(
        "a call of the model's own, stream",
        _copy(parallel_tool_calls=False, stream=True),
        each(calls(_SCHEMAS, most=1, reason="length")),
        needs_copying=True,
    ),
    _tools(
        "several calls",
        _copy(max_tokens=120),
        each(lambda message: None if len(message.calls) > 1 else f"{len(message.calls)} calls, {message.text!r}"),
        needs_copying=True,
    ),
    _tools("the result of a call", _ask(messages=_turns("Paris"), max_tokens=20), each(text_alone)),
    _tools("the results of two calls", _ask(messages=_turns("Paris", "Rome"), max_tokens=20), each(text_alone)),
    _tools("required", _ask(tool_choice="required", parallel_tool_calls=False), each(calls(_SCHEMAS, most=1))),
    _tools(
        "required, stream",
        _ask(tool_choice="required", parallel_tool_calls=False, stream=True),
        each(calls(_SCHEMAS, most=1)),
    ),
    _tools(
        "required, n = 2",
        _ask(tool_choice="required", parallel_tool_calls=False, n=2),
        each(calls(_SCHEMAS, most=1), count=2),
    ),
    _tools(
        "a named function",
        _ask(tool_choice=_NAMED, parallel_tool_calls=False),
        each(calls({"get_weather": _WEATHER}, most=1)),
    ),
    _tools(
        "a named function, stream",
        _ask(tool_choice=_NAMED, parallel_tool_calls=False, stream=True),
        each(calls({"get_weather": _WEATHER}, most=1)),
    ),
    _tools("none", _copy(tool_choice="none"), each(text_alone)),
    _tools(
        "a strict function where the model decides",
        _copy(tools=[_tool("get_weather", strict=True)], parallel_tool_calls=False),
        each(calls({"get_weather": _WEATHER}, most=1, reason="length")),
        needs_copying=True,
    ),
    _tools(
        "a required call that is cut off",
        _ask(tool_choice="required", max_tokens=8),
        each(lambda message: None if message.reason == "length" else str(message)),
    ),
    _tools("required without tools", _chat(tool_choice="required"), refused("tool_choice")),
    _tools(
        "a named function that is not there",
        _ask(tool_choice={"type": "function", "function": {"name": "other"}}),
        refused("tool_choice"),
    ),
    _tools("a choice that is none", _ask(tool_choice="always"), refused("tool_choice")),
    _tools(
        "a schema that is none",
        _ask(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "unknown"}}}]),
        refused("tools"),
    ),
)
CASES: Sequence[Case] = (*STRUCTURED, *TOOLS)


def main(argv: Sequence[str] | None = None) -> int:
    """Send all requests and report. Exit status 1 if a case fails that has to pass."""
    parser = CommandParser(prog="python -m benchmarks.robustness.server_cases", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model that answers (default: the embedded model)")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    args: argparse.Namespace = parser.parse_args(argv)
    found = asyncio.run(_served(EngineConfig(model=args.model, chat_template=TEMPLATE, max_model_len=1024)))
    report = {
        "num_cases": dict(Counter(case.area for case in CASES)),
        "num_passed": dict(Counter(case.area for case in CASES if found[case.name] is None)),
        "known": {case.name: case.lacks for case in CASES if case.lacks is not None},
        "failed": {case.name: found[case.name] for case in CASES if found[case.name] is not None},
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if args.json is not None:
        write_document(args.json, "server_cases", options={"model": Path(args.model).name}, **report)
    return 1 if unexpected(found, copies=args.model != DEFAULT_MODEL) else 0


def unexpected(found: Mapping[str, str | None], *, copies: bool) -> dict[str, str]:
    """What is wrong with cases that have to pass; some need a model that copies what it has seen."""
    required = (case for case in CASES if case.lacks is None and (copies or not case.needs_copying))
    return {case.name: problem for case in required if (problem := found.get(case.name)) is not None}


async def _served(config: EngineConfig) -> dict[str, str | None]:
    engine = await AsyncEngine.start(config)
    try:
        transport = httpx.ASGITransport(create_app(engine, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as http:
            return await problems(http, CASES)
    finally:
        await engine.close()


async def problems(http: httpx.AsyncClient, cases: Sequence[Case], **fields: Any) -> dict[str, str | None]:
    """What is wrong with the reply to each case, by name; None if nothing is.

    Args:
        http: Of the server.
        cases: All are sent at once.
        **fields: Further fields of chat completions.
    """
    found = await asyncio.gather(*(_problem(http, case, fields) for case in cases))
    return {case.name: problem for case, problem in zip(cases, found, strict=True)}


async def _problem(http: httpx.AsyncClient, case: Case, fields: Mapping[str, Any]) -> str | None:
    is_chat = "messages" in case.body
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    answer = await http.post(path, json={**(fields if is_chat else {}), **case.body})
    return case.check(read_reply(answer.status_code, answer.text, is_stream=bool(case.body.get("stream"))))


if __name__ == "__main__":
    sys.exit(main())
