"""Rungs of the ladder as arguments: a name with limits, a plan book, or a goal for which the engine has limits.

A rung is NAME=TOKENS/SEQS, NAME=BOOK.json, NAME=BOOK.json@TOKENS/SEQS, or NAME=GOAL (throughput, balanced, latency).
A book without TOKENS/SEQS runs under the limits that are stored in it (`StoredBook.limits`). `ladder/whole_runs.py` and
`ladder/steady.py` run rungs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from nanoflow.cli.options import OptionGroup
from nanoflow.config import ConfigError, EngineConfig, Goal
from nanoflow.models.presets import preset_name
from nanoflow.plan.book import load_book

SEQUENTIAL, NANO_BATCHES = "sequential", "nano-batches"

ENGINE = OptionGroup(
    kind=EngineConfig,
    title="model and engine",
    skip=frozenset({"seed", "plan", "max_batch_tokens", "max_num_seqs", "goal", "load_format"}),
    defaults={"model": "preset:llama-3-8b", "dtype": "bfloat16"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A rung; the engine chooses limits that are None."""

    name: str
    book: Path | None = None
    max_batch_tokens: int | None = None
    max_num_seqs: int | None = None
    goal: Goal = "throughput"

    def on(self, engine: EngineConfig) -> EngineConfig:
        """Options of an engine with this rung's limits and plans."""
        limits: dict[str, Any] = {"max_batch_tokens": self.max_batch_tokens, "max_num_seqs": self.max_num_seqs}
        given = {name: value for name, value in limits.items() if value is not None}
        plan = None if self.book is None else str(self.book)
        return replace(engine, **given, plan=plan, goal=self.goal)


def read_engine(group: OptionGroup[EngineConfig], args: argparse.Namespace) -> EngineConfig:
    """Options of the engine from the command line; a preset gets random weights."""
    engine = group.read(args)
    return engine if preset_name(engine.model) is None else replace(engine, load_format="random")


def read_limits(text: str) -> tuple[int, int]:
    """Token budget and number of requests at once; ConfigError if the text is not TOKENS/SEQS."""
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", text):
        raise ConfigError(f"{text!r} is no TOKENS/SEQS, as 2048/1024")
    tokens, seqs = map(int, text.split("/"))
    return tokens, seqs


def read_rungs(texts: Sequence[str]) -> list[Rung]:
    """All rungs; those that share a name get their limits appended to it.

    Raises:
        ConfigError: A rung is invalid, two are the same, or none is sequential.
    """
    rungs = [read_rung(text) for text in texts]
    if all(rung.book is not None for rung in rungs):
        raise ConfigError(f"there is no sequential rung to compare with: give {SEQUENTIAL}=TOKENS/SEQS")
    names = [rung.name for rung in rungs]
    named = [replace(rung, name=_with_limits(rung)) if names.count(rung.name) > 1 else rung for rung in rungs]
    if len({rung.name for rung in named}) < len(named):
        raise ConfigError("two rungs are the same")
    return named


def _with_limits(rung: Rung) -> str:
    if rung.max_batch_tokens is None:
        return f"{rung.name} {rung.goal}"
    return f"{rung.name} {rung.max_batch_tokens}/{rung.max_num_seqs}"


def read_rung(text: str) -> Rung:
    """One rung.

    Raises:
        ConfigError: The text is not a rung, or its book has no plan, so that it would be sequential.
    """
    name, _, what = text.partition("=")
    if not name or not what:
        raise ConfigError(f"{text!r} is no rung: write {SEQUENTIAL}=2048/1024 or searched=BOOK.json")
    if what in get_args(Goal):
        if name != SEQUENTIAL:
            raise ConfigError(f"{text!r}: the rung {name} has no plan book, so it would be {SEQUENTIAL}")
        return Rung(name=name, goal=what)  # type: ignore[arg-type]
    file, _, limits = what.rpartition("@") if re.search(r"@\d+/\d+$", what) else (what, "", "")
    if re.fullmatch(r"\d+/\d+", what):
        file, limits = "", what
    if name == SEQUENTIAL and file:
        raise ConfigError(f"{text!r}: a {SEQUENTIAL} rung has no plan book")
    if name != SEQUENTIAL and not file:
        raise ConfigError(f"{text!r}: the rung {name} has no plan book, so it would be {SEQUENTIAL}")
    tokens, seqs = read_limits(limits) if limits else (None, None)
    if not file:
        return Rung(name=name, max_batch_tokens=tokens, max_num_seqs=seqs)
    stored = load_book(Path(file))
    if not stored.plans:
        raise ConfigError(f"{text!r}: the book has no plan, so the run would be {SEQUENTIAL}")
    if not limits and stored.limits is None:
        raise ConfigError(f"{text!r}: the book says no limits; write {text}@TOKENS/SEQS")
    if tokens is None and stored.limits is not None:
        tokens, seqs = stored.limits.max_batch_tokens, stored.limits.max_num_seqs
    return Rung(name=name, book=Path(file), max_batch_tokens=tokens, max_num_seqs=seqs)
