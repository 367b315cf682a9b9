"""The base class of request bodies, and the types of texts and token ids in them. The bodies are in `protocol.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Tag, model_validator

from nanoflow.parameters import INT32_MAX, RequestError, is_whole, shown
from nanoflow.server.foreign import ForeignFields, without_foreign


def _check_unicode(text: str) -> str:
    """Refuse lone surrogates: JSON can escape them, but they are no characters and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None
    return text


def read_ids(value: Any) -> Any:
    """Token ids as integers, also if JSON writes them as 2.0. Anything but a list of numbers is refused later."""
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if not kinds or not kinds <= {int, float}:
        return value
    ids = value
    if float in kinds:
        ids = [int(item) if is_whole(item) else item for item in value]
    low, high = min(ids), max(ids)
    if low < 0 or high > INT32_MAX:
        raise RequestError(f"token id {shown(low if low < 0 else high)} is out of vocabulary")
    return ids


def _read_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and is_whole(value) else value


Text = Annotated[str, AfterValidator(_check_unicode)]
WholeNumber = Annotated[int, BeforeValidator(_read_whole)]
"""An integer, which JSON may also write as 2.0."""
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
ChoiceWord = Annotated[Literal["none", "auto", "required"], Tag("<word>")]
"""A `tool_choice` that is no object."""


def word_or_object(value: Any) -> str:
    """The tag of a value that may be a word or an object, so that an error is about that form alone."""
    return "<object>" if isinstance(value, dict | BaseModel) else "<word>"


def _document_foreign(schema: dict[str, Any], model: type[RequestBody]) -> None:
    """Show in the OpenAPI document which fields are accepted without effect, and that no others are."""
    properties = schema.setdefault("properties", {})
    properties |= {name: field.schema for name, field in model.foreign.items() if name not in properties}


class RequestBody(BaseModel):
    """Base of all bodies: JSON types are not converted (no "5" for 5), and unknown fields are refused."""

    model_config = ConfigDict(
        strict=True, allow_inf_nan=False, extra="forbid", frozen=True, json_schema_extra=_document_foreign
    )
    foreign: ClassVar[ForeignFields] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_foreign(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        is_open = cls.model_config.get("extra") == "allow"
        return without_foreign(body, cls.model_fields, cls.foreign, is_open=is_open)


def only_types(what: str, *known: str) -> Callable[[Any], Any]:
    """A validator that refuses objects whose `type` is not one of `known`, by name; it leaves the rest to others."""

    def check(value: Any) -> Any:
        kind = value.get("type", known[0]) if isinstance(value, dict) else known[0]
        if kind not in known:
            names = ", ".join(known)
            raise RequestError(f"{what} of type {shown(kind)} are not taken here, only {names}", param="type")
        return value

    return check
