"""Fields of request bodies that are checked as `SamplingParams` are: same bounds, conversions and messages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from nanoflow.parameters import Kind
from nanoflow.request import KINDS
from nanoflow.structured import StructuredKind


@dataclass(frozen=True, slots=True)
class Parameter:
    """A field that may be null, or a value that is checked as a parameter of `SamplingParams`.

    Attributes:
        name: Name of the field.
        kind: The values that are allowed.
    """

    name: str
    kind: Kind

    @staticmethod
    def of(name: str, like: str | None = None, **bounds: Any) -> Parameter:
        """The field `name`, checked as the parameter of that name or as `like`, optionally with other bounds."""
        kind: Any = KINDS[like or name]
        return Parameter(name, dataclasses.replace(kind, **bounds) if bounds else kind)

    @staticmethod
    def of_structured(name: str) -> Parameter:
        """The field `name`, which asks for a shape of the answer; see `structured.SPELLINGS`."""
        return Parameter(name, StructuredKind(spelling=name))

    def read(self, value: Any) -> Any:
        """The value, checked and converted."""
        return None if value is None else self.kind.read(self.name, value)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """For pydantic: the schema that reads the field."""
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """For pydantic: the JSON schema of the field."""
        return {"anyOf": [self.kind.schema, {"type": "null"}]}
