"""What shape a completion must have: a JSON schema, a regular expression, a choice of texts, or a grammar.

Every spelling is read here into one object, `Structured`: `structured_outputs` and its older names, and OpenAI's
`response_format`. Python arguments and HTTP bodies use the same code. Whether a grammar means something is decided
elsewhere: `grammars/` turns these into grammars and compiles them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from nanoflow.parameters import RequestError, did_you_mean, shown

GrammarKind = Literal["json", "regex", "choice", "grammar", "structural_tag"]

MAX_GRAMMAR_CHARS = 1 << 18
MAX_GRAMMAR_CHOICES = 10_000
ANY_OBJECT = '{"type": "object"}'
# What a `response_format` has beside its type, by its type.
_PARTS_OF_FORMAT: Mapping[str, Sequence[str]] = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "structural_tag": ("structures", "triggers", "format"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """The shape of a completion.

    Attributes:
        kind: What `text` is.
        text: A JSON schema; a regular expression that the whole completion matches; a JSON list of texts, of which the
            completion is one; a grammar in Lark's format; or the JSON object of a structural tag, with `structures`
            (each `begin`, `schema` and `end`) and `triggers`.
        parts: Shapes that a grammar was made of: a request is refused if one of them cannot be used alone.
    """

    kind: GrammarKind
    text: str
    parts: tuple[Structured, ...] = ()


def read_structured(name: str, value: object) -> Structured | None:
    """Read what vLLM calls `structured_outputs`.

    Args:
        name: Of the parameter, for errors.
        value: A `Structured`, or a mapping or dataclass with one of `json` (a schema as an object or as text), `regex`,
            `choice` (a list of texts), `grammar` (Lark) and `json_object` (true).

    Returns:
        None if nothing is asked for.

    Raises:
        RequestError: The value is something else, asks for several shapes at once, or is too long.
    """
    if isinstance(value, Structured):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object with one of {', '.join(_READERS)}, got {shown(value)}")
    given = {key: part for key, part in value.items() if part is not None and part is not False}
    for key in given:
        if key not in _READERS:
            hint = did_you_mean(str(key), _READERS) or f"; there are {', '.join(_READERS)}"
            raise RequestError(f"{name}: {shown(key)} is not supported{hint}")
    if len(given) > 1:
        raise RequestError(f"{name} must have one shape, not {' and '.join(map(str, given))}")
    for key, part in given.items():
        return _READERS[key](f"{name}.{key}", part)
    return None


def read_response_format(name: str, value: object) -> Structured | None:
    """Read OpenAI's `response_format`: {"type": "text"}, "json_object", or "json_schema" with a `json_schema`.

    Raises:
        RequestError: It is something else.
    """
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object, got {shown(value)}")
    kind = value.get("type")
    for key, part in value.items():
        if part is not None and key not in ("type", *_PARTS_OF_FORMAT.get(str(kind), (key,))):
            raise RequestError(f"{name} of type {shown(kind)} has no {shown(key)}")
    match kind:
        case "text":
            return None
        case "json_object":
            return Structured(kind="json", text=ANY_OBJECT)
        case "json_schema":
            return _read_json_schema(f"{name}.json_schema", value.get("json_schema"))
        case "structural_tag":
            return _read_tags(name, value)
        case other:
            kinds = "'text', 'json_object', 'json_schema' or 'structural_tag'"
            raise RequestError(f"{name}.type must be {kinds}, got {shown(other)}")


def _read_json_schema(name: str, value: object) -> Structured:
    """Read a named schema. `strict` changes nothing: the schema always holds to the letter."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object with a schema, got {shown(value)}")
    for key in value:
        if key not in ("name", "description", "schema", "strict"):
            raise RequestError(f"{name} has no {shown(key)}: it has name, description, schema and strict")
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{name}.strict must be true or false, got {shown(strict)}")
    return _read_schema(f"{name}.schema", value.get("schema"))


def _read_schema(name: str, value: object) -> Structured:
    if isinstance(value, str):
        text = _checked(name, value)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise RequestError(f"{name} is not valid JSON") from None
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be a JSON schema, which is an object, got {shown(value)}")
    return Structured(kind="json", text=_checked(name, _as_json(name, value)))


def _read_text(kind: GrammarKind) -> Callable[[str, object], Structured]:
    def read(name: str, value: object) -> Structured:
        if not isinstance(value, str) or not value:
            raise RequestError(f"{name} must be a text that is not empty, got {shown(value)}")
        return Structured(kind=kind, text=_checked(name, value))

    return read


def _read_choice(name: str, value: object) -> Structured:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        raise RequestError(f"{name} must be a list of texts that is not empty, got {shown(value)}")
    if len(value) > MAX_GRAMMAR_CHOICES:
        raise RequestError(f"{name} may hold at most {MAX_GRAMMAR_CHOICES} entries, got {len(value)}")
    for choice in value:
        if not isinstance(choice, str) or not choice:
            raise RequestError(f"{name} must be texts that are not empty, got {shown(choice)}")
    return Structured(kind="choice", text=_checked(name, _as_json(name, list(value))))


def _read_tags(name: str, value: object) -> Structured:
    """Read a structural tag: text that is free up to a trigger, and then held to a structure that begins with it."""
    if isinstance(value, str):
        try:
            value = json.loads(_checked(name, value))
        except (ValueError, RecursionError):
            raise RequestError(f"{name} is not valid JSON") from None
    if not isinstance(value, Mapping) or "format" in value:
        raise RequestError(f"{name} must be an object with structures and triggers")
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(one, str) and one for one in triggers):
        raise RequestError(f"{name}.triggers must be a list of texts that is not empty, got {shown(triggers)}")
    if not isinstance(structures, list) or not structures:
        raise RequestError(f"{name}.structures must be a list that is not empty, got {shown(structures)}")
    for place, one in enumerate(structures):
        part = f"{name}.structures[{place}]"
        if not isinstance(one, Mapping) or not all(isinstance(one.get(key), str) for key in ("begin", "end")):
            raise RequestError(f"{part} must be an object with begin and end, which are texts, and a schema")
        if not one["begin"].startswith(tuple(triggers)):
            raise RequestError(f"{part}.begin must begin with one of the triggers, got {shown(one['begin'])}")
        if not isinstance(one.get("schema"), Mapping):
            raise RequestError(f"{part}.schema must be a JSON schema, which is an object")
    kept = {"structures": structures, "triggers": triggers}
    return Structured(kind="structural_tag", text=_checked(name, _as_json(name, kept)))


def _read_any_object(name: str, value: object) -> Structured:
    if value is not True:
        raise RequestError(f"{name} must be true or false, got {shown(value)}")
    return Structured(kind="json", text=ANY_OBJECT)


def _as_json(name: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise RequestError(f"{name} is not valid JSON") from None


def _checked(name: str, text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"{name} may have at most {MAX_GRAMMAR_CHARS} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name}: the text is not valid Unicode: it has a lone surrogate") from None
    return text


_READERS: Mapping[str, Callable[[str, object], Structured]] = {
    "json": _read_schema,
    "regex": _read_text("regex"),
    "choice": _read_choice,
    "grammar": _read_text("grammar"),
    "json_object": _read_any_object,
    "structural_tag": _read_tags,
}

SPELLINGS: Mapping[str, Callable[[str, object], Structured | None]] = {
    "structured_outputs": read_structured,
    "response_format": read_response_format,
    **{f"guided_{kind}": _READERS[kind] for kind in ("json", "regex", "choice", "grammar")},
}
"""Every name under which a shape may be asked for, and how its value is read."""


def structured_outputs_params(**given: Any) -> Structured | None:
    """The shape of a completion, by the keyword arguments of vLLM's `StructuredOutputsParams`.

    Args:
        **given: One of `json`, `regex`, `choice`, `grammar` and `json_object`; see `read_structured`.

    Raises:
        RequestError: As `read_structured`.
    """
    return read_structured("structured_outputs", given)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredKind:
    """The kind of a parameter that asks for a shape (see `parameters.Kind`); how it is read follows from its name.

    Attributes:
        spelling: One of `SPELLINGS`, whose values the schema describes.
    """

    spelling: str = "structured_outputs"

    def read(self, name: str, value: object) -> Structured | None:
        """See `Kind`."""
        return SPELLINGS[self.spelling](name, value)

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        if self.spelling == "structured_outputs":
            return {"type": "object", "properties": _SCHEMAS, "additionalProperties": False}
        if self.spelling == "response_format":
            return {
                "type": "object",
                "properties": {
                    "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
                    "structures": {"description": "Of a structural tag: a list of objects with begin, schema and end"},
                    "triggers": {"description": "Of a structural tag: a list of texts"},
                    "json_schema": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "description": {"type": "string"},
                            "schema": {"type": "object"},
                            "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                        },
                    },
                },
                "required": ["type"],
            }
        return _SCHEMAS[self.spelling.removeprefix("guided_")]


_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_GRAMMAR_CHARS}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "json": {"anyOf": [{"type": "object"}, _TEXT]},
    "regex": _TEXT,
    "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    "grammar": _TEXT,
    "json_object": {"type": "boolean"},
    "structural_tag": {"anyOf": [{"type": "object"}, _TEXT]},
}
