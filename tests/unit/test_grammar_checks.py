"""Bad and hostile grammars are refused in one line and in bounded time, and good ones go on being served."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nanoflow import StructuredOutputsParams
from nanoflow.config import EngineConfig
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.grammar_checks import GrammarChecks
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.request import RequestError, SamplingParams

# Longer than any of these takes but those that must be stopped, on a machine that is busy with other things.
PATIENT_S = 60.0


@pytest.fixture(scope="module")
def checks() -> Iterator[GrammarChecks]:
    made = GrammarChecks(Tokenizer.load(EngineConfig()), timeout_s=PATIENT_S)
    yield made
    made.close()


def asked(**given: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**given))


def nested(depth: int) -> str:
    return '{"type": "object", "properties": {"a":' * depth + "{}" + "}}" * depth


def chain(length: int) -> dict[str, Any]:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "integer"}}}


def rules(count: int) -> str:
    return "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(count)) + f'a{count}: "x"\n'


GOOD: dict[str, dict[str, Any]] = {
    "object": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    "nested": {"json": nested(40)},
    "references": {"json": chain(50)},
    "tree": {"json": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}},
    "alternatives": {"json": {"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]}},
    "enum of thousands": {"json": {"enum": [f"v{i}" for i in range(8000)]}},
    "choice of thousands": {"choice": [f"v{i}" for i in range(8000)]},
    "repetitions": {"regex": "(.*a.{20}){20}"},
    "Lark": {"grammar": 'start: "a" INT\nINT: /[0-9]+/'},
    "special tokens": {"grammar": 'start: <|user|> "a" <[3]> <[2047]>'},
}


@pytest.mark.parametrize("name", GOOD)
def test_good_grammars_pass_as_they_are(checks: GrammarChecks, name: str) -> None:
    params = asked(**GOOD[name])
    assert checks.checked(params) == params


def test_the_format_of_llama_cpp_becomes_that_of_lark(checks: GrammarChecks) -> None:
    params = checks.checked(asked(grammar='root ::= "a" [0-9]+'))
    assert params.structured_outputs is not None and params.structured_outputs.text.startswith("%llguidance")
    assert "start:" in params.structured_outputs.text


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "deeper than JSON": ({"json": nested(120)}, "the schema cannot be used: recursion limit exceeded"),
    "long chain": ({"json": chain(4000)}, "the schema cannot be used: it is nested too deeply"),
    "many rules": ({"grammar": rules(15_000)}, "the grammar cannot be used: it is nested too deeply"),
    "cycle": ({"json": {"$ref": "#"}}, "the schema cannot be used: no text satisfies it"),
    "remote": ({"json": {"$ref": "http://127.0.0.1:9/x.json"}}, "the schema cannot be used: Resource 'http://127"),
    "file": ({"json": {"$ref": "file:///etc/passwd"}}, "the schema cannot be used: Resource 'file:///etc/passwd'"),
    "keyword": ({"json": {"uniqueItems": True}}, 'the schema cannot be used: Unimplemented keys: ["uniqueItems"]'),
    "names that repeat": (
        {"json": {"anyOf": [{"patternProperties": {"^x": {}}, "minProperties": 2}]}},
        "the schema cannot be used: minProperties 2 cannot be held where names are free",
    ),
    "too many digits": (
        {"json": {"items": [{"enum": ["a", {"b": 9007199254740993}]}]}},
        "the schema cannot be used: the number 9007199254740993 of const or enum has too many digits",
    ),
    "above nothing": (
        {"json": {"properties": {"a": {"exclusiveMinimum": 0, "maximum": 0.5}}}},
        "the schema cannot be used: exclusiveMinimum 0 cannot be held with another bound nearer than 1: use minimum",
    ),
    "contradiction": ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "the schema cannot be used: "),
    "huge enum": ({"json": {"enum": [f"v{i}" for i in range(25_000)]}}, "the schema cannot be used: initial lexer"),
    "open": ({"regex": "(a"}, "the regex cannot be used: at 1(8): invalid regex"),
    "look-around": ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
    "nothing": ({"regex": r"a[^\s\S]"}, "the regex cannot be used: no text satisfies it"),
    "no grammar": ({"grammar": "start: ("}, "the grammar cannot be used: "),
    "no special token": (
        {"grammar": "start: <|usr|>"},
        'the grammar cannot be used: at 1(8): unknown special token: "<|usr|>"',
    ),
    "no token": (
        {"grammar": "start: <[2048]>"},
        "the grammar cannot be used: at 1(8): Token range end too large: 2048",
    ),
    "no rule": ({"grammar": 'start: "a" b'}, "the grammar cannot be used: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_grammars_are_refused_in_a_line(checks: GrammarChecks, name: str) -> None:
    given, message = BAD[name]
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(RequestError) as caught:
            checks.checked(asked(**given))
        text = str(caught.value)
        assert message in text and "\n" not in text and len(text) < 300, text
        assert caught.value.param == "structured_outputs"
    assert checks.checked(asked(regex="ok"))


def test_what_takes_forever_is_stopped_and_others_do_not_wait() -> None:
    """Among all multiples of a large prime the first step of a compiler loses itself."""
    forever = asked(json={"type": "integer", "multipleOf": 1_000_003})

    async def both(checks: GrammarChecks) -> float:
        # Both processes are there already.
        await asyncio.gather(*(checks.checked_aside(asked(regex=text)) for text in ("one", "two")))
        slow = asyncio.create_task(checks.checked_aside(forever))
        await asyncio.sleep(0.05)
        start_s = time.monotonic()
        assert await checks.checked_aside(asked(regex="a")) == asked(regex="a")
        took_s = time.monotonic() - start_s
        assert not slow.done()
        with pytest.raises(RequestError, match=r"the schema cannot be used: it takes longer than 1\.5 s"):
            await slow
        return took_s

    checks = GrammarChecks(timeout_s=1.5)
    try:
        assert asyncio.run(both(checks)) < 1.5
    finally:
        checks.close()


def test_results_are_remembered(checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch) -> None:
    params = asked(regex="remembered")
    checks.checked(params)
    monkeypatch.setattr(checks._processes, "ask", lambda job: pytest.fail(f"asked again: {json.loads(job)}"))
    assert checks.checked(params) == params and asyncio.run(checks.checked_aside(params)) == params


def test_parameters_without_a_shape_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = GrammarChecks()
    params = SamplingParams()
    assert checks.checked(params) is params and asyncio.run(checks.checked_aside(params)) is params
    assert not checks._processes._all
    checks.close()
    with pytest.raises(EngineDeadError):
        checks.checked(asked(regex="a"))
