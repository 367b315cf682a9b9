"""Options by their names: a config from keyword arguments by nanoflow's names or vLLM's; unknown ones are refused.

What options there are is in `config.py`; vLLM's names are tables in `compat/`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from nanoflow.compat.engine_options import ENGINE
from nanoflow.compat.entries import EMPTY, Alias, Foreign, Table
from nanoflow.compat.sampling_options import SAMPLING
from nanoflow.compat.server_options import SERVER
from nanoflow.compat.unknown import unknown_option
from nanoflow.config import ConfigError, EngineConfig, ServerConfig
from nanoflow.request import SamplingParams

ConfigT = TypeVar("ConfigT")


def from_kwargs(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a config from keyword arguments, by nanoflow's or vLLM's names.

    None means the default unless None is a value of its own.

    Raises:
        ConfigError: An unknown name, an unreadable value, an option of vLLM that nanoflow lacks, or two names of one
            option with different values.
    """
    return kind(**by_own_names(kind, values))


def by_own_names(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments by nanoflow's own names, with their values converted.

    An option of vLLM that nanoflow lacks is dropped if its value asks for what nanoflow does anyway.

    Raises:
        ConfigError: As `from_kwargs`.
    """
    names = names_of(kind)
    found: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in values.items():
        if name not in names:
            _pass_over(kind, name, values)
            continue
        field, alias = names[name]
        if value is None and field.name == "model":
            raise ConfigError("model must be a folder or a name, got None")
        if value is None and (alias is not None or field.default is not None):
            continue
        read = _read(field, alias, name, value)
        if field.name in found and found[field.name] != read:
            other = given_as[field.name]
            raise ConfigError(
                f"{other} ({values[other]}) and {name} ({value}) are two names of one option: give one of them"
            )
        found[field.name], given_as[field.name] = read, name
    return found


def names_of(kind: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Alias | None]]:
    """Every name of every option, own names first: its field, and its alias (None for the own name)."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    own: dict[str, tuple[dataclasses.Field[Any], Alias | None]] = {
        name: (field, None) for name, field in fields.items()
    }
    other = {alias.name: (fields[alias.to], alias) for alias in table_of(kind).aliases if alias.name not in own}
    return {**own, **other}


def table_of(kind: type[Any]) -> Table:
    """vLLM's options that correspond to a config class; an empty table if there are none."""
    return {EngineConfig: ENGINE, ServerConfig: SERVER, SamplingParams: SAMPLING}.get(kind, EMPTY)


def _pass_over(kind: type[Any], name: str, values: Mapping[str, Any]) -> None:
    """Refuse an option that nanoflow lacks, unless its value asks for what nanoflow does anyway."""
    entry = table_of(kind).entries.get(name)
    if not isinstance(entry, Foreign):
        raise ConfigError(unknown_option(name, list(names_of(kind))))
    if not entry.changes_nothing(values[name], values):
        raise ConfigError(entry.refusal(values[name]))


def _read(field: dataclasses.Field[Any], alias: Alias | None, name: str, value: Any) -> Any:
    """A value converted to the type that the config stores."""
    read = field.metadata.get("read")
    try:
        if alias is not None and alias.convert is not None:
            value = alias.convert(value)
            read = read if isinstance(value, str) else None
        if read is None or value is None:
            return value
        return read(json.dumps(value) if isinstance(value, Mapping) else str(value))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
