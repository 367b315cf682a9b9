"""Turns config dataclasses into command-line flags, and parsed flags back into configs.

A field `page_size: int = 16` is the flag `--page-size N`. Its help text comes from the field or from the docstring of
the class. Aliases are flags too, and the help names them. A flag that is not given sets nothing, so the dataclass alone
has the defaults. Flags of vLLM that nanoflow lacks are in `foreign_flags.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from nanoflow.cli.foreign_flags import add_foreign_flags, with_dashes
from nanoflow.compat.entries import Alias, Table
from nanoflow.compat.unknown import unknown_option
from nanoflow.option_names import by_own_names, from_kwargs, names_of, table_of
from nanoflow.structured import Structured

ConfigT = TypeVar("ConfigT")
Subcommands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers() returns

_METAVARS = {int: "N", float: "X", str: "TEXT", Structured: "JSON"}


class CommandParser(argparse.ArgumentParser):
    """A parser that accepts no abbreviated flags, and suggests the nearest flag for an unknown one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.tables: list[Table] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown flags here, where the flags of the subcommand are known.

        Underscores in flag names are accepted. Foreign flags of vLLM are added last, so that own flags take precedence.
        """
        own = {flag for flag in self._option_string_actions if flag.startswith("--")}
        add_foreign_flags(self, self.tables)
        self.tables = []
        parsed, extras = super().parse_known_args(with_dashes(sys.argv[1:] if args is None else args), namespace)
        if extras:
            flags = [extra.partition("=")[0] for extra in extras if extra.startswith("-")]
            self.error(unknown_option(flags[0], sorted(own)) if flags else f"unexpected argument {extras[0]!r}")
        return parsed, extras

    def error(self, message: str) -> NoReturn:
        """Print the error as one line and a pointer to the help as another, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\nTry '{self.prog} --help'.\n")


def add_command(
    commands: Subcommands[CommandParser], name: str, summary: str, teach: str, examples: str
) -> CommandParser:
    """Add a subcommand with a one-line summary, a paragraph of explanation, and examples at the end."""
    parser = commands.add_parser(name, help=summary, description=teach, epilog=f"examples:\n{examples}")
    parser.usage = f"{parser.prog} [options]"
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error (also: NANOFLOW_DEBUG=1)")
    return parser


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionGroup(Generic[ConfigT]):
    """The flags of one config dataclass in one command.

    Attributes:
        kind: The dataclass.
        title: Heading in the help.
        skip: Fields without a flag in this command.
        defaults: Fields whose default differs from the dataclass's in this command.
    """

    kind: type[ConfigT]
    title: str
    skip: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add a flag for each field to the parser, and one for each of its aliases."""
        if isinstance(parser, CommandParser):
            parser.tables.append(table_of(self.kind))
        group = parser.add_argument_group(self.title)
        hints = get_type_hints(self.kind)
        texts = _attribute_texts(self.kind)
        for field in self._fields():
            text = field.metadata.get("help") or texts.get(field.name, "")
            aliases = self._aliases(field.name)
            also = "; ".join(" ".join(filter(None, (_flag(alias.name), alias.note))) for alias in aliases)
            how = _how_to_parse(hints[field.name], field.metadata.get("nargs"), field.metadata.get("read"))
            group.add_argument(
                _flag(field.name),
                *table_of(self.kind).flags_of(field.name),
                dest=field.name,
                default=argparse.SUPPRESS,
                help=_help(f"{text} (also {also})" if also else text, self.defaults.get(field.name, field.default)),
                **how,
            )
            for alias in aliases:
                # An own `dest`, so that two names with different values can be detected.
                is_other = alias.convert is not None and "action" not in how
                group.add_argument(
                    _flag(alias.name),
                    *alias.flags,
                    dest=alias.name,
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                    **({"type": str} if is_other else how),
                )

    def given(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields whose flags are on the command line, under any of their names.

        Raises:
            ConfigError: Two names of one field have different values.
        """
        names = {
            name
            for field in self._fields()
            for name in (field.name, *(alias.name for alias in self._aliases(field.name)))
        }
        return by_own_names(self.kind, {name: value for name, value in vars(args).items() if name in names})

    def read(self, args: argparse.Namespace, recommended: Mapping[str, Any] | None = None) -> ConfigT:
        """Build the config from the command line.

        Args:
            args: The parsed command line.
            recommended: Defaults that replace the group's own.

        Raises:
            ValueError: A value is out of its range (`ConfigError` for options of the engine and the server).
        """
        return from_kwargs(self.kind, {**self.defaults, **(recommended or {}), **self.given(args)})

    def _aliases(self, name: str) -> list[Alias]:
        """The aliases of a field."""
        others = (alias for _, alias in names_of(self.kind).values())
        return [alias for alias in others if alias is not None and alias.to == name]

    def _fields(self) -> list[dataclasses.Field[Any]]:
        return [field for field in dataclasses.fields(self.kind) if field.name not in self.skip]  # type: ignore[arg-type]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _how_to_parse(hint: Any, nargs: str | None, read: Callable[[str], Any] | None) -> dict[str, Any]:
    """Arguments of `add_argument` for a type: `X | None` is parsed as X, a sequence is a repeatable flag."""
    members = [member for member in get_args(hint) if member is not type(None)]
    kinds = [hint] if get_origin(hint) in (None, Literal, Sequence, tuple) else members
    for kind in kinds:
        if get_origin(kind) in (Sequence, tuple):
            item = get_args(kind)[0]
            how = {"action": "extend", "nargs": nargs} if nargs else {"action": "append"}
            return {"type": item, "metavar": _METAVARS[item], **how}
    if isinstance(kinds[0], type) and issubclass(kinds[0], enum.Enum):
        return {"type": lambda name: kinds[0][name.upper()], "metavar": "|".join(kinds[0].__members__).lower()}
    if kinds[0] is bool:
        return {"action": argparse.BooleanOptionalAction}
    parse = {} if read is None else {"type": _parser_of(read)}
    if get_origin(kinds[0]) is Literal:
        return {"choices": get_args(kinds[0]), **parse}
    return {"type": kinds[0], "metavar": _METAVARS[kinds[0]], **parse}


def _parser_of(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same function, but it raises errors that argparse prints in full."""

    def parse(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _help(text: str, default: Any) -> str:
    """Help text with the default, if it is worth showing; percent signs are escaped for argparse."""
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
    is_shown = default is not None and default != () and default is not dataclasses.MISSING
    return (text + (f" (default: {shown})" if is_shown else "")).replace("%", "%%")


def _attribute_texts(kind: type[Any]) -> dict[str, str]:
    """Texts of the `Attributes:` section in a dataclass's docstring, by field."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in entries}
