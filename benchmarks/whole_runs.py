"""Overlap against the best that a sequential engine can do: whole runs of every rung at its own limits, in turn.

All requests are there at once, and the run ends with the last token. Rungs are engines, built one after the other on
one card, each in a process of its own. A sequential rung has limits alone; several may be given, and the fastest of
them on a workload is what all others are compared with. Other rungs have a plan book, and the limits that it says
(`StoredBook.limits`) or that stand after it. From the root of the repository:

    python -m benchmarks.whole_runs --model preset:llama-3-8b --workloads 1024/512:1400 trace:sharegpt.csv:2500 \\
        --rungs sequential=2048/1024 sequential=8192/2048 nano-batches=nano.json@2048/1024 searched=book.json \\
        --json benchmarks/results/whole_runs_llama-3-8b.json

A rung is NAME=TOKENS/SEQS, NAME=BOOK.json, NAME=BOOK.json@TOKENS/SEQS, or NAME=GOAL (throughput, balanced, latency):
limits as the engine chooses them. Sequential rungs of several limits get these into their names. Books of nano-batches
and of each mechanism are made by `python -m benchmarks.books`, searched ones by `nanoflow search`. The record is
written after each run; begun again, only what is missing runs. Exit status 1 if a run is missing or a request failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.in_turn import Run, Setting, add_options, run_in_turn
from benchmarks.rungs import ENGINE, read_engine, read_rungs
from benchmarks.workloads import read_workloads
from nanoflow.bench.options import ThroughputConfig
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.workload import draw_lengths

MEASUREMENT = OptionGroup(
    kind=ThroughputConfig,
    title="measurement",
    skip=frozenset(
        {"workload", "num_requests", "repeats", "json", "goodput", "bounds", "random_weights", "allow_dirty"}
    ),
    defaults={"num_warmup": 32},
)


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
    ENGINE.add_to(parser)
    return parser


def read_settings(args: argparse.Namespace) -> list[Setting]:
    """Every rung on every workload, rung by rung; ConfigError if one makes no sense."""
    engine = read_engine(ENGINE, args)
    rungs = read_rungs(args.rungs)
    configs = read_workloads(args, MEASUREMENT)
    for config in configs:
        draw_lengths(config.workload, 1, 0)
    return [Setting(name=rung.name, engine=rung.on(engine), config=config) for rung in rungs for config in configs]


if __name__ == "__main__":
    sys.exit(main())
