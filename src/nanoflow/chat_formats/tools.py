"""Which functions a request declares for the model to call, and whether it has to call one: checked here.

Requests over HTTP and `LLM.chat` use the same checks. Names and shapes are OpenAI's.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from nanoflow.parameters import RequestError, shown

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_RULE = "1 to 64 letters, digits, underscores and dashes"
_BAD_SCHEMA = "invalid_function_parameters"


class Calling(enum.StrEnum):
    """Whether a message has calls."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether a message has calls, and of which function.

    Attributes:
        calling: Whether there are calls.
        name: The only function that may be called; None for any of those declared.
    """

    calling: Calling = Calling.AUTO
    name: str | None = None

    def of(self, tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The tools that the model is shown, and that it may call."""
        if self.calling is Calling.NONE:
            return []
        return [tool for tool in tools if self.name in (None, tool["function"]["name"])]


def read_tools(tools: Any) -> list[Mapping[str, Any]]:
    """Check tools.

    Args:
        tools: Each {"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}.

    Raises:
        RequestError: A tool is something else, two have one name, or a schema is not that of an object; `param` has
            the place.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools must be a list, got {type(tools).__name__}", param="tools")
    places: dict[str, int] = {}
    for place, tool in enumerate(tools):
        name = _read_function(f"tools[{place}]", tool)
        if name in places:
            _refuse(f"tools[{place}].function.name", f"is {name!r}, as that of tools[{places[name]}]")
        places[name] = place
    return list(tools)


def tool_names(tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the functions, in their order."""
    return tuple(tool["function"]["name"] for tool in tools)


def has_strict(tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the arguments of any of these functions have to match their schema."""
    return any(tool["function"].get("strict") is True for tool in tools)


def read_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """Read "none", "auto", "required" or {"type": "function", "function": {"name": ...}}; None is "auto".

    Args:
        choice: The choice.
        tools: The declared tools, checked.

    Raises:
        RequestError: It is something else, or asks for a call of what is not declared.
    """
    if choice is None:
        return ToolChoice()
    if isinstance(choice, str) and choice in tuple(Calling):
        if choice == Calling.REQUIRED and not tools:
            _refuse("tool_choice", "is only allowed when tools are given")
        return ToolChoice(Calling(choice))
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        known = ", ".join(map(repr, map(str, Calling)))
        _refuse("tool_choice", f"must be {known} or an object of type 'function' with its name, got {shown(choice)}")
    if name not in tool_names(tools):
        _refuse("tool_choice", f"names the function {shown(name)}, which is not in tools")
    return ToolChoice(Calling.REQUIRED, name)


def _read_function(place: str, tool: Any) -> str:
    """Check a tool; returns its name."""
    if not isinstance(tool, Mapping):
        _refuse(place, f"must be an object, got {type(tool).__name__}")
    if tool.get("type") != "function":
        _refuse(f"{place}.type", f"must be 'function', got {shown(tool.get('type'))}")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{place}.function", f"must be an object, got {type(function).__name__}")
    name, description, strict = (function.get(key) for key in ("name", "description", "strict"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{place}.function.name", f"must be a text of {_NAME_RULE}, got {shown(name)}")
    if description is not None and not isinstance(description, str):
        _refuse(f"{place}.function.description", f"must be a text, got {type(description).__name__}")
    if strict is not None and not isinstance(strict, bool):
        _refuse(f"{place}.function.strict", f"must be true or false, got {type(strict).__name__}")
    _check_schema(f"{place}.function.parameters", name, function.get("parameters"))
    return name


def _check_schema(place: str, name: str, schema: Any) -> None:
    """Check what can be checked of a schema of arguments without reading all of it: it is the schema of an object."""
    if schema is None:
        return
    if not isinstance(schema, Mapping):
        raise RequestError(f"{place} must be a JSON schema, got {type(schema).__name__}", param=place, code=_BAD_SCHEMA)
    kind = schema.get("type", "object")
    problem = None
    if kind != "object":
        problem = f"a JSON schema of type 'object' is needed, got type {shown(kind)}"
    elif not isinstance(schema.get("properties", {}), Mapping):
        problem = "its properties must be an object"
    else:
        try:
            json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"it is no JSON: {error}"
    if problem is not None:
        raise bad_schema(name, problem, place)


def bad_schema(name: str, problem: str, param: str) -> RequestError:
    """The error that the schema of a function's arguments, which is in the field `param`, cannot be used."""
    return RequestError(f"invalid schema for function {name!r}: {problem}", param=param, code=_BAD_SCHEMA)


def _refuse(param: str, problem: str) -> NoReturn:
    raise RequestError(f"{param} {problem}", param=param)
