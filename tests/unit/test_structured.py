"""Every spelling of a shape is read into one object, and what is none is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from nanoflow import GuidedDecodingParams, StructuredOutputsParams
from nanoflow.parameters import RequestError
from nanoflow.request import SamplingParams
from nanoflow.server.protocol import ChatCompletionRequest, CompletionRequest
from nanoflow.structured import MAX_GRAMMAR_CHARS, MAX_GRAMMAR_CHOICES, Structured

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"const": "ü"}}}
AS_JSON = Structured(kind="json", text='{"type": "object", "properties": {"b": {}, "a": {"const": "ü"}}}')
ANY_OBJECT = Structured(kind="json", text='{"type": "object"}')


@dataclass
class Theirs:
    """As an object of vLLM has it."""

    json: Any = None
    regex: str | None = None
    json_object: bool | None = None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": SCHEMA}, AS_JSON),
        ({"json": AS_JSON.text}, AS_JSON),
        ({"json": True}, Structured(kind="json", text="{}")),
        ({"json_object": True}, ANY_OBJECT),
        ({"regex": "a+", "json": None, "json_object": False}, Structured(kind="regex", text="a+")),
        ({"choice": ("ü", "b")}, Structured(kind="choice", text='["ü", "b"]')),
        ({"grammar": 'start: "a"'}, Structured(kind="grammar", text='start: "a"')),
        (Theirs(regex="a"), Structured(kind="regex", text="a")),
        (ANY_OBJECT, ANY_OBJECT),
        ({}, None),
        (Theirs(), None),
    ],
)
def test_python(given: Any, expected: Structured | None) -> None:
    assert SamplingParams(structured_outputs=given).structured_outputs == expected
    older: Any = {"guided_decoding": given}
    assert SamplingParams(**older).structured_outputs == expected
    params = SamplingParams()
    params.structured_outputs = given
    assert params.snapshot().structured_outputs == expected


def test_keyword_arguments() -> None:
    assert StructuredOutputsParams(json=SCHEMA) == GuidedDecodingParams(json=SCHEMA, regex=None) == AS_JSON
    with pytest.raises(RequestError, match="did you mean 'regex'"):
        StructuredOutputsParams(regx="a")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            AS_JSON,
        ),
        ({"structured_outputs": {"json": SCHEMA}, "guided_regex": None}, AS_JSON),
        ({"structured_outputs": {}, "guided_regex": "a"}, Structured(kind="regex", text="a")),
        ({"guided_json": AS_JSON.text}, AS_JSON),
        ({"guided_choice": ["a"]}, Structured(kind="choice", text='["a"]')),
        ({"guided_grammar": "x"}, Structured(kind="grammar", text="x")),
    ],
)
def test_http(given: dict[str, Any], expected: Structured | None) -> None:
    completion = CompletionRequest.model_validate({"prompt": "a", **given})
    chat = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **given})
    for body in (completion, chat):
        assert body.to_params().structured_outputs == expected
        if expected is not None:
            assert body.field_names["structured_outputs"] == [name for name in given if given[name]][-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a", "structured_outputs must be an object with one of json, "),
        ({"json": 5}, "structured_outputs.json must be a JSON schema, which is an object, got 5"),
        ({"json": "{"}, "structured_outputs.json is not valid JSON"),
        ({"json": "[" * 5000}, "structured_outputs.json is not valid JSON"),
        ({"json": {"const": float("nan")}}, "structured_outputs.json is not valid JSON"),
        ({"json": {"const": {1, 2}}}, "structured_outputs.json is not valid JSON"),
        ({"json": {"const": "\ud800"}}, "lone surrogate"),
        ({"json": {"const": "x" * MAX_GRAMMAR_CHARS}}, f"at most {MAX_GRAMMAR_CHARS} characters"),
        ({"regex": ""}, "structured_outputs.regex must be a text that is not empty, got ''"),
        ({"regex": ["a"]}, "structured_outputs.regex must be a text"),
        ({"choice": "abc"}, "structured_outputs.choice must be a list of texts"),
        ({"choice": []}, "structured_outputs.choice must be a list of texts"),
        ({"choice": ["a", ""]}, "structured_outputs.choice must be texts that are not empty, got ''"),
        ({"choice": ["a"] * (MAX_GRAMMAR_CHOICES + 1)}, f"may hold at most {MAX_GRAMMAR_CHOICES} entries"),
        ({"json_object": 1}, "structured_outputs.json_object must be true or false, got 1"),
        ({"json": {}, "regex": "a"}, "structured_outputs must have one shape, not json and regex"),
        ({"structural": "{}"}, "structured_outputs: 'structural' is not supported"),
    ],
)
def test_what_is_no_shape_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(structured_outputs=given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"response_format": "json"}, "response_format must be an object, got 'json'"),
        ({"response_format": {"type": "yaml"}}, "response_format.type must be 'text', 'json_object', 'json_schema' or"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema must be an object with a schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
            "response_format.json_schema has no 'shema': it has name, description, schema and strict",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema must be a JSON schema, which is an object, got None",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
            "response_format of type 'json_object' has no 'schema'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"strict": 1}}},
            "response_format.json_schema.strict must be true or false, got 1",
        ),
        ({"guided_regex": 5}, "guided_regex must be a text"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_json and guided_regex both say what shape"),
    ],
)
def test_what_is_no_shape_over_http_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompletionRequest.model_validate({"prompt": "a", **given})


def test_an_end_of_sequence_is_needed() -> None:
    with pytest.raises(RequestError, match="not with ignore_eos"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), ignore_eos=True)
