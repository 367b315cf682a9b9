"""Tables for docs/switching-from-vllm.md: from the lists in `nanoflow/compat/`, which `LLM` and the commands read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from nanoflow.compat.calls import CALLS, METHODS, PROMPTS
from nanoflow.compat.engine_options import ENGINE
from nanoflow.compat.entries import Alias, Foreign, Same, Table
from nanoflow.compat.imports import MISSING, MISSING_MODULES, MODULES, NAMES
from nanoflow.compat.sampling_options import SAMPLING
from nanoflow.compat.server_options import SERVER
from nanoflow.compat.speculative_config import SPECULATIVE
from nanoflow.config import EngineConfig, ServerConfig

# Options of ours whose names vLLM has too stand as the same, whatever the lists say of them.
_OWN = {
    id(table): frozenset(field.name for field in dataclasses.fields(kind))
    for table, kind in ((ENGINE, EngineConfig), (SERVER, ServerConfig))
}


def known_options(*tables: Table) -> str:
    """Options that are ours, under the same name or another."""
    rows = (
        (f"`{name}`", here, note)
        for table in tables
        for name, here, note in _known(table)
        # Names that vLLM has not are in the list for their values.
        if name != "goal"
    )
    return _markdown(("vLLM", "here", "what differs"), rows)


def engine_known() -> str:
    """Options of the engine that are ours."""
    return known_options(ENGINE)


def engine_foreign() -> str:
    """Options of the engine that there are not."""
    return foreign_options(ENGINE)


def speculative_foreign() -> str:
    """Keys of `speculative_config` that there are not."""
    return foreign_options(SPECULATIVE)


def server_known() -> str:
    """Options of the server that are ours."""
    return known_options(SERVER)


def server_foreign() -> str:
    """Options of the server that there are not."""
    return foreign_options(SERVER)


def sampling_known() -> str:
    """Parameters of sampling that are ours."""
    return known_options(SAMPLING)


def sampling_foreign() -> str:
    """Parameters of sampling that there are not."""
    return foreign_options(SAMPLING)


def calls() -> str:
    """Arguments of methods, and keys of prompts, that there are not."""
    return foreign_options(CALLS, PROMPTS)


def imports() -> str:
    """What can be imported."""
    rows = [
        ("`nanoflow`", _names(NAMES)),
        *((f"`{module}`", _names(names)) for module, names in MODULES.items() if names),
    ]
    return _markdown(("from", "import"), rows)


def missing() -> str:
    """What cannot be imported or called, by reason."""
    found: dict[str, list[str]] = {}
    for names in (MISSING, MISSING_MODULES, {f"{name}()": reason for name, reason in METHODS.reasons.items()}):
        for name, reason in names.items():
            found.setdefault(reason, []).append(name)
    return _markdown(("there is no", "as"), ((_names(names), reason) for reason, names in found.items()))


def foreign_options(*tables: Table) -> str:
    """Options that there are not, with the values at which they are taken; those of one reason and value together."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in (entry for table in tables for entry in table.foreign if not _is_own(table, entry.name)):
        found.setdefault((_taken(entry), entry.reason), []).append(entry.name)
    rows = ((_names(names), taken, reason) for (taken, reason), names in found.items())
    return _markdown(("option", "taken at", "with other values refused, as"), rows)


def _known(table: Table) -> Iterable[tuple[str, str, str]]:
    for entry in table.entries.values():
        match entry:
            case Alias():
                yield entry.name, f"`{entry.to}`", entry.note
            case Same():
                values = (f"{_json(theirs)} is {_json(ours)}" for theirs, ours in entry.values.items())
                refused = [f"not {', '.join(map(_json, entry.refused))}"] if entry.refused else []
                yield entry.name, "the same", "; ".join(filter(None, (entry.note, *values, *refused)))
            case Foreign() if _is_own(table, entry.name):
                yield entry.name, "the same", ""


def _is_own(table: Table, name: str) -> bool:
    return name in _OWN.get(id(table), frozenset())


def _taken(entry: Foreign) -> str:
    values = [_json(value) for value in entry.takes]
    return ", ".join([*values, *([f"the value of `{entry.same_as}`"] if entry.same_as else []), "`None`"])


def _json(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
