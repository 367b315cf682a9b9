"""Limits set by hand against limits chosen by the engine: whole runs in turn.

Each pair of a token budget and a number of requests is an engine of its own, and so is `LLM(model)` for each goal
named. The latter are compared with the fastest pair on each workload. From the root of the repository:

    python -m benchmarks.engine.limits --model preset:llama-3-8b --workloads trace:sharegpt.csv:1500 1024/512:1000 \\
        --pairs 2048/256 2048/1024 4096/1024 8192/2048 --json benchmarks/results/limits_llama-3-8b.json

The record is written after each run. Started again, the command measures only what the record lacks. Exit status 1 if a
run is missing or a request failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from benchmarks.common.in_turn import Run, Setting, add_options, run_in_turn
from benchmarks.common.rungs import read_engine, read_limits
from benchmarks.common.workloads import MEASUREMENT, read_workloads
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import EngineConfig, Goal
from nanoflow.workload import draw_lengths

PAIRS = ("2048/1024", "4096/1024", "4096/2048", "8192/1024", "8192/2048", "16384/2048")
CHOSEN = "chosen for"

_ENGINE = OptionGroup(
    kind=EngineConfig,
    title="model and engine",
    skip=frozenset({"seed", "load_format", "max_batch_tokens", "max_num_seqs", "goal"}),
    defaults={"model": "preset:llama-3-8b"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the record lacks, then print and write the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(args.json, allows_dirty=args.allow_dirty)
        return run_in_turn("limits", read_settings(args), args, is_set_by_hand)
    except ValueError as error:
        parser.error(str(error))


def is_set_by_hand(run: Run) -> bool:
    """Whether the limits of a run were given."""
    return not str(run["asked"]["name"]).startswith(CHOSEN)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.engine.limits", description=__doc__)
    parser.add_argument("--workloads", nargs="+", required=True, metavar="WORKLOAD:N", help="with numbers of requests")
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=list(PAIRS),
        metavar="TOKENS/SEQS",
        help=f"limits set by hand (default: {' '.join(PAIRS)})",
    )
    parser.add_argument(
        "--goals",
        nargs="*",
        default=["throughput", "balanced"],
        choices=get_args(Goal),
        help="goals for which the engine chooses limits (default: throughput balanced)",
    )
    add_options(parser)
    MEASUREMENT.add_to(parser)
    _ENGINE.add_to(parser)
    return parser


def read_settings(args: argparse.Namespace) -> list[Setting]:
    """Every pair and every goal on all workloads; ConfigError if one is invalid."""
    engine = read_engine(_ENGINE, args)
    engines = {}
    for pair in args.pairs:
        tokens, seqs = read_limits(pair)
        engines[pair] = replace(engine, max_batch_tokens=tokens, max_num_seqs=seqs, goal="throughput")
    for goal in args.goals:
        engines[f"{CHOSEN} {goal}"] = replace(engine, goal=goal)
    configs = read_workloads(args, MEASUREMENT)
    for config in configs:
        draw_lengths(config.workload, 1, 0)
    return [Setting(name=name, engine=each, config=config) for name, each in engines.items() for config in configs]


if __name__ == "__main__":
    sys.exit(main())
