"""Overlap against the best sequential engine: whole runs of every rung, each at its own limits, in turn.

All requests are there at once, and a run ends with the last token. Every rung is an engine in a process of its own;
they run one after the other on one card. A sequential rung has limits alone. There may be several, and the fastest of
them on a workload is the one that all others are compared with. Any other rung has a plan book, and limits: those
stored in the book (`StoredBook.limits`), or those written after it. From the root of the repository:

    python -m benchmarks.ladder.whole_runs --model preset:llama-3-8b \\
        --workloads 1024/512:1400 trace:sharegpt.csv:2500 \\
        --rungs sequential=2048/1024 sequential=8192/2048 nano-batches=nano.json@2048/1024 searched=book.json \\
        --json benchmarks/results/whole_runs_llama-3-8b.json

A rung is NAME=TOKENS/SEQS, NAME=BOOK.json, NAME=BOOK.json@TOKENS/SEQS, or NAME=GOAL (throughput, balanced, latency)
for limits that the engine chooses. Sequential rungs with different limits get these appended to their names. Books of
nano-batches and of each mechanism are made by `python -m benchmarks.ladder.books`, searched ones by `nanoflow search`.
The record is written after each run. Started again, the command measures only what the record lacks. Exit status 1 if
a run is missing or a request failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common.in_turn import Run, Setting, add_options, run_in_turn
from benchmarks.common.rungs import ENGINE, read_engine, read_rungs
from benchmarks.common.workloads import MEASUREMENT, read_workloads
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser
from nanoflow.workload import draw_lengths


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the record lacks, then print and write the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(args.json, allows_dirty=args.allow_dirty)
        return run_in_turn("whole_runs", read_settings(args), args, is_sequential)
    except ValueError as error:
        parser.error(str(error))


def is_sequential(run: Run) -> bool:
    """Whether a run had no plan but the sequential one."""
    return bool(run["settings"]["num_plans"] == 0)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.ladder.whole_runs", description=__doc__)
    parser.add_argument("--workloads", nargs="+", required=True, metavar="WORKLOAD:N", help="with numbers of requests")
    parser.add_argument("--rungs", nargs="+", required=True, metavar="NAME=WHAT", help="see above; one is sequential")
    add_options(parser)
    MEASUREMENT.add_to(parser)
    ENGINE.add_to(parser)
    return parser


def read_settings(args: argparse.Namespace) -> list[Setting]:
    """Every rung on every workload, rung by rung; ConfigError if one is invalid."""
    engine = read_engine(ENGINE, args)
    rungs = read_rungs(args.rungs)
    configs = read_workloads(args, MEASUREMENT)
    for config in configs:
        draw_lengths(config.workload, 1, 0)
    return [Setting(name=rung.name, engine=rung.on(engine), config=config) for rung in rungs for config in configs]


if __name__ == "__main__":
    sys.exit(main())
