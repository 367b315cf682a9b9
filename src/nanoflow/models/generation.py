"""Default sampling parameters of a model, from its generation_config.json.

The same fields are read as in vLLM; `do_sample` is not one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.models.fields import INT32_MAX, Fields, is_there, read_object
from nanoflow.request import SamplingParams

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values for fields of `SamplingParams` that a request does not give; None means `SamplingParams`' own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def __str__(self) -> str:
        """The fields that are set, as text for a user."""
        listed = ", ".join(f"{name}={value:g}" for name, value in self.fields.items())
        return f"sampling defaults of the model: {listed}" if listed else "no sampling defaults of the model"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that are set, as arguments of `SamplingParams`."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None}

    def params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The parameters of a request that gives these fields.

        Raises:
            ValueError: A field is out of its range, or fields contradict each other.
        """
        return SamplingParams(**{**self.fields, **given})


NO_DEFAULTS = SamplingDefaults()


def load_sampling_defaults(source: str, folder: Path | None) -> SamplingDefaults:
    """The defaults that a model recommends.

    Args:
        source: "auto" for generation_config.json in the model's folder, "vllm" for no file, or a folder with one.
        folder: The model's folder; None for a model without one.

        Raises:
        ModelError: A field is invalid, or the named folder has no such file.
    """
    path = _path(source, folder)
    if path is None:
        return NO_DEFAULTS
    fields = Fields(values=read_object(path), origin=str(path))
    defaults = SamplingDefaults(
        temperature=_number(fields, "temperature"),
        top_p=_number(fields, "top_p"),
        top_k=_whole(fields, "top_k"),
        min_p=_number(fields, "min_p"),
        repetition_penalty=_number(fields, "repetition_penalty"),
        max_tokens=_whole(fields, "max_new_tokens"),
    )
    try:
        defaults.params({})
    except ValueError as error:
        raise fields.problem(f"{error} (generation_config=vllm ignores this file)") from None
    return defaults


def named_file(source: str) -> Path | None:
    """The file that a source names instead of the model's own; None if it names none."""
    return None if source in ("auto", "vllm") else Path(source).expanduser() / GENERATION_CONFIG


def _path(source: str, folder: Path | None) -> Path | None:
    """The file to read; None if there is none."""
    named = named_file(source)
    if named is not None or source == "vllm" or folder is None:
        return named
    return folder / GENERATION_CONFIG if is_there(folder / GENERATION_CONFIG) else None


def _number(fields: Fields, name: str) -> float | None:
    return fields.number(name) if fields.has(name) else None


def _whole(fields: Fields, name: str) -> int | None:
    return fields.whole(name, most=INT32_MAX) if fields.has(name) else None
