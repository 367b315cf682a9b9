"""What a JSON schema may say that llguidance takes, but does not hold completions to.

Such a schema is refused when it is first compiled (`engine/grammar_process.py`), since what ends by itself has to be
valid. What llguidance cannot read it refuses itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from nanoflow.structured import Structured

# Where a schema has further schemas: by name, as a list, and alone (or as a list, in older drafts).
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_ALONE = ("items", "additionalItems", "additionalProperties")
# llguidance keeps numbers as doubles, and may be off in the last place from more digits than this.
_MAX_DIGITS = 15
_MAX_EXACT = 1 << 53


def unheld_in(structured: Structured) -> str | None:
    """`unheld` of the schemas in a shape; None if it has none."""
    if structured.kind not in ("json", "structural_tag"):
        return None
    given = json.loads(structured.text)
    schemas = [given] if structured.kind == "json" else [one["schema"] for one in given["structures"]]
    return next((reason for each in schemas if (reason := unheld(each)) is not None), None)


def unheld(schema: Any) -> str | None:
    """Why a schema cannot be held, in a line; None if nothing is known that cannot.

    Args:
        schema: The schema as it was read from JSON. What is no schema is left to others.
    """
    checks = (_repeats_names, _rounds, _lets_zero_pass)
    return next((reason for each in _schemas(schema) for check in checks if (reason := check(each)) is not None), None)


def _repeats_names(schema: Mapping[str, Any]) -> str | None:
    """Names that the schema does not say may come twice; one more than is required is sure to be another one."""
    count, required = schema.get("minProperties"), schema.get("required")
    sure = len({key for key in required if isinstance(key, str)}) if isinstance(required, list) else 0
    if not _is_number(count) or count <= sure + 1 or not _is_open(schema):
        return None
    return f"minProperties {count} cannot be held where names are free: require them, or forbid others"


def _rounds(schema: Mapping[str, Any]) -> str | None:
    """Numbers of const and enum are read as doubles."""
    wrong = next((each for each in _numbers([schema.get("const"), schema.get("enum")]) if not _is_exact(each)), None)
    return None if wrong is None else f"the number {wrong!r} of const or enum has too many digits: it would be rounded"


def _lets_zero_pass(schema: Mapping[str, Any]) -> str | None:
    """A bound that excludes 0 includes it where the other one is nearer to 0 than 1."""
    for excluding, including, others, sign in (
        ("exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"), 1),
        ("exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        ends = [sign * schema[key] for key in others if _is_number(schema.get(key))]
        start = sign * schema[including] if _is_number(schema.get(including)) else 0
        # In draft 4 it is a flag of the other one.
        zero = including if schema.get(excluding) is True else excluding
        is_zero = _is_number(schema.get(zero)) and schema[zero] == 0
        if is_zero and start <= 0 and ends and 0 < min(ends) < 1:
            return f"{excluding} 0 cannot be held with another bound nearer than 1: use {including}"
    return None


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all that are in it; values of `const`, `enum` and the like are none."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, Mapping):
            continue
        yield each
        for key in _BY_NAME:
            waiting += each[key].values() if isinstance(each.get(key), Mapping) else ()
        for key in (*_LISTS, *_ALONE):
            part = each.get(key)
            waiting += part if isinstance(part, list) else [part]


def _is_open(schema: Mapping[str, Any]) -> bool:
    """Whether an object may have members whose names the schema does not say."""
    return bool(schema.get("patternProperties")) or schema.get("additionalProperties") is not False


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a value of JSON."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
        elif _is_number(each):
            yield each


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_exact(number: int | float) -> bool:
    if isinstance(number, int) and abs(number) <= _MAX_EXACT:
        return True
    digits = repr(number).partition("e")[0].replace(".", "").strip("-0")
    return len(digits) <= _MAX_DIGITS
