"""What llguidance takes and does not hold is refused; what it holds is not, and completions of that are valid."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from nanoflow.engine.grammar_process import answer
from nanoflow.grammars.text import grammar_of, limits
from nanoflow.grammars.unheld import unheld
from nanoflow.structured import Structured

INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    "schema",
    [
        {"minProperties": 1},
        {"minProperties": 2, "required": ["a"]},
        {"minProperties": 2, "additionalProperties": False},
        {"minProperties": 3, "required": ["a", "b"], "patternProperties": {"^x": INTEGER}},
        {"minProperties": True},
        {"properties": {"minProperties": {"const": 5}, "const": INTEGER, "enum": INTEGER}},
        {"const": {"minProperties": 7}},
        {"enum": [1 << 53, 10**25, 0.1, -1.5e-7, True, "9007199254740993"]},
        {"exclusiveMinimum": 0},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"exclusiveMinimum": 0, "minimum": 0.1, "maximum": 0.5},
        {"minimum": 0, "maximum": 0.5},
        {"minimum": 0, "exclusiveMinimum": False, "maximum": 0.5},
        {"exclusiveMinimum": True, "maximum": 0.5},
        # Of no schema others say what is wrong with it.
        {"minProperties": "2", "required": "a", "properties": 1, "allOf": {}, "enum": 3, "exclusiveMinimum": "0"},
        True,
    ],
)
def test_what_can_be_held_passes(schema: Any) -> None:
    assert unheld(schema) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"minProperties": 2},
        {"minProperties": 2, "additionalProperties": INTEGER},
        {"minProperties": 2, "additionalProperties": False, "patternProperties": {"^a$": INTEGER}},
        {"minProperties": 3, "required": ["a", "a"]},
        {"const": (1 << 53) + 1},
        {"enum": [[{"a": 123456789.12345679}]]},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 0.01},
        {"minimum": -0.5, "exclusiveMaximum": 0},
        {"minimum": 0, "exclusiveMinimum": 0, "maximum": 0.5},
        {"minimum": 0, "exclusiveMinimum": True, "maximum": 0.5},
    ],
)
def test_what_cannot_is_found_wherever_it_stands(schema: Any) -> None:
    assert unheld(schema) is not None
    for within in (
        {"properties": {"const": schema}},
        {"items": [{}, schema]},
        {"$defs": {"a": {"prefixItems": [schema]}}},
        {"anyOf": [{"additionalProperties": schema}]},
    ):
        assert unheld(within) == unheld(schema)
        tag = {"structures": [{"begin": "<f>", "schema": within, "end": ""}], "triggers": ["<f>"]}
        for kind, given in (("json", within), ("structural_tag", tag)):
            answered = answer(json.dumps({"kind": kind, "text": json.dumps(given)}).encode())
            assert answered == {"error": unheld(schema)}


BOUNDS = (None, -10, -1, -0.5, 0, 0.05, 1, 2.5)
NUMBERS = ("0", "-0", "1", "-1", "0.5", "-0.5", "0.05", "10", "0.0", "2.50")


@pytest.mark.parametrize("low", BOUNDS)
@pytest.mark.parametrize("high", BOUNDS)
def test_numbers_keep_to_the_bounds_that_pass(low: float | None, high: float | None) -> None:
    for lowest, highest in product(("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        given = {key: value for key, value in ((lowest, low), (highest, high)) if value is not None}
        schema = {"type": "number", **given}
        if unheld(schema) is not None:
            continue
        structured = Structured(kind="json", text=json.dumps(schema))
        taken = {text for text in NUMBERS if is_taken(structured, text)}
        right = {text for text in NUMBERS if jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))}
        # Some spellings of what is valid are not used.
        assert taken <= right and right - taken <= {"-0", "0.0", "2.50"}, schema


def is_taken(structured: Structured, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(structured), log_level=0, limits=limits())
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and bool(matcher.is_accepting())
