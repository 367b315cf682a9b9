"""`EngineArgs`: the options of an engine as an object, by vLLM's names.

`config.py` defines the options. `LLM.from_engine_args`, `AsyncLLM` and `LLMEngine` make engines from it.
"""

from __future__ import annotations

import argparse
from typing import Any

from nanoflow.cli.foreign_flags import add_foreign_flags
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.compat.engine_options import ENGINE
from nanoflow.config import DEFAULT_MODEL, EngineConfig
from nanoflow.option_names import from_kwargs, names_of

_GROUP = OptionGroup(kind=EngineConfig, title="model and engine")


class EngineArgs:
    """The options of an engine, which may be changed until an engine is made; they are checked on creation and then.

    It has an attribute for each given option, by the name that it was given by; other options read as their default.
    `vars(args)` are arguments of `LLM`.

    Args:
        model: As for `LLM`.
        **options: As for `LLM`.

    Raises:
        ConfigError: As for `LLM`.
    """

    __dataclass_fields__ = EngineConfig.__dataclass_fields__  # For `dataclasses.asdict`.

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        vars(self).update({"model": model, **options})
        self.config()

    def __getattr__(self, name: str) -> Any:
        found = names_of(EngineConfig).get(name)
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no option {name!r}")
        field, alias = found
        value = getattr(self.config(), field.name)
        return value if alias is None or alias.convert is None else alias.convert(value)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({given})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EngineArgs) and self.config() == other.config()

    __hash__ = None  # type: ignore[assignment]

    def config(self) -> EngineConfig:
        """The options as nanoflow's config; ConfigError if one is invalid."""
        return from_kwargs(EngineConfig, vars(self))

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add a flag for each option, as in `nanoflow serve`; flags that are not given set nothing."""
        _GROUP.add_to(parser)
        if not isinstance(parser, CommandParser):
            add_foreign_flags(parser, [ENGINE])
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """The options on a command line."""
        return cls(**_GROUP.given(args))


class AsyncEngineArgs(EngineArgs):
    """The same, for `AsyncLLM`."""
