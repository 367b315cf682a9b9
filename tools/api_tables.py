"""Tables for docs/api.md: from the kinds of parameters, the models of bodies, and the tables of foreign fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from nanoflow.request import KINDS, SamplingParams
from nanoflow.server.body import RequestBody
from nanoflow.server.conversation_fields import Message, TextPart
from nanoflow.server.embedding_fields import EmbeddingRequest
from nanoflow.server.foreign import OF_GENERATION, OF_MESSAGES, OF_PARTS, OF_STREAMS, OF_TOKENS, ForeignFields
from nanoflow.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    PrefetchRequest,
    StreamOptions,
    TokenizeRequest,
)

BODIES: dict[str, type[RequestBody]] = {
    "`/v1/completions`": CompletionRequest,
    "`/v1/chat/completions`": ChatCompletionRequest,
    "`/v1/embeddings`": EmbeddingRequest,
    "`/v1/prefetch`": PrefetchRequest,
    "`/tokenize`": TokenizeRequest,
    "`/detokenize`": DetokenizeRequest,
    "`stream_options`": StreamOptions,
    "a message": Message,
    "a part of a message": TextPart,
}
FOREIGN: dict[str, ForeignFields] = {
    "bodies": {**OF_TOKENS, **OF_GENERATION},
    "`stream_options`": OF_STREAMS,
    "messages": OF_MESSAGES,
    "parts": OF_PARTS,
}


def sampling_parameters() -> str:
    """What each parameter may be, and what it is if it is not given."""
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    rows = ((f"`{name}`", _values(kind.schema), f"`{defaults[name]!r}`") for name, kind in KINDS.items())
    return _table(("parameter", "values", "default"), rows)


def body_fields() -> str:
    """The fields of each body."""
    rows = ((body, ", ".join(f"`{name}`" for name in model.model_fields)) for body, model in BODIES.items())
    return _table(("body", "fields"), rows)


def foreign_fields() -> str:
    """Fields that are taken at some values alone."""
    rows = (
        (f"`{name}`", place, _harmless(field.harmless), field.reason)
        for place, fields in FOREIGN.items()
        for name, field in sorted(fields.items())
    )
    return _table(("field", "of", "taken at", "about"), rows)


def _harmless(values: tuple[Any, ...] | None) -> str:
    return "any value" if values is None else ", ".join(f"`{json.dumps(value)}`" for value in (None, *values))


def _values(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words, as far as those of parameters go."""
    if schema.get("additionalProperties") is False:
        return f"an object with one of {', '.join(schema['properties'])}"
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    match schema["type"]:
        case "integer" | "number" as kind:
            return f"{kind} from {schema['minimum']} to {schema['maximum']}"
        case "boolean":
            return "true or false"
        case "string":
            return "a string"
        case "array":
            of = {"string": "strings", "integer": "token ids"}[schema["items"]["type"]]
            return f"a list of {of}{_at_most(schema.get('maxItems'))}"
        case _:
            return f"token ids with a {_values(schema['additionalProperties'])}{_at_most(schema['maxProperties'])}"


def _at_most(count: int | None) -> str:
    return "" if count is None else f", {count} at most"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
