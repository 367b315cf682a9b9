"""Overlap against the best that a sequential engine can do: whole runs of every rung at its own limits, in turn.

All requests are there at once, and the run ends with the last token. Rungs are engines, built one after the other on
one card, each in a process of its own. A sequential rung has limits alone; several may be given, and the fastest of
them on a workload is what all others are compared with. Other rungs have a plan book, and the limits that it says
(`StoredBook.limits`) or that stand after it. From the root of the repository:

    python -m benchmarks.whole_runs --model preset:llama-3-8b --workloads 1024/512:1400 trace:sharegpt.csv:2500 \\
        --rungs sequential=2048/1024 sequential=8192/2048 nano-batches=nano.json@2048/1024 searched=book.json \\
        --json benchmarks/results/whole_runs_llama-3-8b.json

A rung is NAME=TOKENS/SEQS, NAME=BOOK.json, NAME=BOOK.json@TOKENS/SEQS, or NAME=GOAL (throughput, balanced, latency):
limits as the engine chooses them. Sequential rungs of several limits get these into their names. The record is written
after each run; begun again, only what is missing runs. Exit status 1 if a run is missing or a request failed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks.in_turn import Run, Setting, add_options, run_in_turn
from benchmarks.ladder import SEQUENTIAL
from benchmarks.targets import read_workloads
from nanoflow.bench.config import ThroughputConfig
from nanoflow.bench.provenance import require_clean
from nanoflow.bench.workload import draw_lengths
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import ConfigError, EngineConfig, Goal
from nanoflow.models.presets import preset_name
from nanoflow.plan.book import load_book

MEASUREMENT = OptionGroup(
    kind=ThroughputConfig,
    title="measurement",
    skip=frozenset(
        {"workload", "num_requests", "repeats", "json", "goodput", "bounds", "random_weights", "allow_dirty"}
    ),
    defaults={"num_warmup": 32},
)
_ENGINE = OptionGroup(
    kind=EngineConfig,
    title="model and engine",
    skip=frozenset({"seed", "plan", "max_batch_tokens", "max_num_seqs", "goal", "load_format"}),
    defaults={"model": "preset:llama-3-8b", "dtype": "bfloat16"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A rung as it is asked for; limits that are None are the engine's choice."""

    name: str
    book: Path | None = None
    max_batch_tokens: int | None = None
    max_num_seqs: int | None = None
    goal: Goal = "throughput"

    def on(self, engine: EngineConfig) -> EngineConfig:
        """An engine with this rung's limits and plans."""
        limits: dict[str, Any] = {"max_batch_tokens": self.max_batch_tokens, "max_num_seqs": self.max_num_seqs}
        given = {name: value for name, value in limits.items() if value is not None}
        plan = None if self.book is None else str(self.book)
        return replace(engine, **given, plan=plan, goal=self.goal)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print and write what it was worth."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(args.json, allows_dirty=args.allow_dirty)
        return run_in_turn("whole_runs", read_settings(args), args, is_sequential)
    except ValueError as error:
        parser.error(str(error))


def is_sequential(run: Run) -> bool:
    """Whether no plan was there to choose."""
    return bool(run["settings"]["num_plans"] == 0)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.whole_runs", description=__doc__)
    parser.add_argument("--workloads", nargs="+", required=True, metavar="WORKLOAD:N", help="with numbers of requests")
    parser.add_argument("--rungs", nargs="+", required=True, metavar="NAME=WHAT", help="see above; one is sequential")
    add_options(parser)
    MEASUREMENT.add_to(parser)
    _ENGINE.add_to(parser)
    return parser


def read_settings(args: argparse.Namespace) -> list[Setting]:
    """Every rung on every workload, rung by rung; ConfigError if one makes no sense."""
    engine = read_engine(_ENGINE, args)
    rungs = read_rungs(args.rungs)
    configs = [replace(config, bounds=False) for config in read_workloads(args, MEASUREMENT)]
    for config in configs:
        draw_lengths(config.workload, 1, 0)
    return [Setting(name=rung.name, engine=rung.on(engine), config=config) for rung in rungs for config in configs]


def read_engine(group: OptionGroup[EngineConfig], args: argparse.Namespace) -> EngineConfig:
    """The engine asked for; an architecture has weights drawn at random."""
    engine = group.read(args)
    return engine if preset_name(engine.model) is None else replace(engine, load_format="random")


def read_rungs(texts: Sequence[str]) -> list[Rung]:
    """The rungs asked for; ConfigError if one makes no sense, or none is sequential."""
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
    """A rung as `make_parser` describes them.

    Raises:
        ConfigError: It is none, or its book has no plan: nothing that was not searched is called so.
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
    tokens, seqs = map(int, limits.split("/")) if limits else (None, None)
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


if __name__ == "__main__":
    sys.exit(main())
