"""A field of a request body that is read as `SamplingParams` reads it: with its bounds, conversions and messages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from nanoflow.parameters import Kind
from nanoflow.request import KINDS


@dataclass(frozen=True, slots=True)
class Parameter:
    """A field that is read as a parameter of `SamplingParams` is, in whose words it is refused; or null.

    Attributes:
        name: Of the field.
        kind: What it may be.
    """

    name: str
    kind: Kind

    @staticmethod
    def of(name: str, like: str | None = None, **bounds: Any) -> Parameter:
        """The field `name` as the parameter of that name, or `like` another, maybe within other bounds."""
        kind: Any = KINDS[like or name]
        return Parameter(name, dataclasses.replace(kind, **bounds) if bounds else kind)

    def read(self, value: Any) -> Any:
        """The value as the parameter has it."""
        return None if value is None else self.kind.read(self.name, value)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """For pydantic: how the field is read."""
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """For pydantic: what the field may be."""
        return {"anyOf": [self.kind.schema, {"type": "null"}]}
