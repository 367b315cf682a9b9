"""Rungs in the steady state of a workload, each at its own limits, in turn on one card.

A run that gets all requests at once begins with prompts alone and ends with decodes alone. A busy server is in between:
requests arrive as others finish. So here the first requests start at random positions within their completions, and
there are always requests waiting. From the root of the repository:

    python -m benchmarks.ladder.steady --model preset:llama-3-8b --workloads 1024/512 512/1024 \\
        --rungs sequential=2048/1024 sequential=8192/2048 nano-batches=nano.json searched=book.json \\
        --json benchmarks/results/steady_llama-3-8b.json

A rung is NAME=TOKENS/SEQS, NAME=BOOK.json or NAME=BOOK.json@TOKENS/SEQS. Tokens/s of each rung are compared with those
of the fastest sequential rung. Rungs with the same limits take turns on one engine and compute the same batches; if one
of them is sequential, the record also has the gain over it on these batches. Rungs with other limits run on another
engine, in a process of its own. The order of engines is reversed in every second repeat, so that a linear drift affects
all of them equally. All engines have the number of KV pages of the first one, whose limits are the largest and leave
the least memory for pages. Under other limits a turn has another random mix of prompts and decodes; the record has this
mix, and longer turns make it more alike. The record is written after each workload. Started again, the command
measures only what the record lacks. Exit status 1 if something is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common.apart import RunFailed, yielded_apart
from benchmarks.common.in_turn import Run, add_options, asked_of, begin, line, table, write_record
from benchmarks.common.rungs import ENGINE, Rung, read_engine, read_rungs
from benchmarks.ladder.steady_engine import Clock, Found, Repeat, run_repeat
from benchmarks.ladder.whole_runs import is_sequential
from nanoflow.bench.machine import git_revision
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.workload import draw_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The whole job of the command.

    Attributes:
        engine: Options without limits and plans.
        groups: Rungs, grouped by their limits, the largest limits first.
        workloads, clock: See `Repeat`.
        num_repeats: Repeats of everything.
        profile: Profile for predictions; None for none.
    """

    engine: EngineConfig
    groups: Sequence[Sequence[Rung]]
    workloads: Sequence[str]
    clock: Clock
    num_repeats: int
    profile: Path | None

    def asked(self, rung: Rung, workload: str, repeat: int) -> dict[str, Any]:
        """The key of a run (`in_turn.asked_of`)."""
        clock = dataclasses.asdict(self.clock)
        return asked_of(rung.name, rung.on(self.engine), workload=workload, num_requests=None, repeat=repeat, **clock)

    def repeat(self, group: Sequence[Rung], workloads: Sequence[str], number: int, num_pages: int | None) -> Repeat:
        """The job of one engine in one repeat."""
        engine = replace(group[0].on(self.engine), plan=None, num_pages=num_pages or self.engine.num_pages)
        return Repeat(
            engine=engine, rungs=group, workloads=workloads, clock=self.clock, number=number, profile=self.profile
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the record lacks, then print and write the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(args.json, allows_dirty=args.allow_dirty)
        task = read_task(args)
        document = begin("steady", args.json, is_fresh=args.fresh)
    except ValueError as error:
        parser.error(str(error))
    record = partial(write_record, args.json, document, is_sequential)
    is_complete = run_missing(task, document["runs"], record, args.time_limit)
    print(table(record(is_complete=is_complete)))
    return 0 if is_complete else 1


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.ladder.steady", description=__doc__)
    parser.add_argument("--workloads", nargs="+", required=True, metavar="WORKLOAD", help="IN/OUT or trace:FILE.csv")
    parser.add_argument("--rungs", nargs="+", required=True, metavar="NAME=WHAT", help="see above; one is sequential")
    parser.add_argument("--turn", type=float, default=5.0, metavar="SECONDS", help="length of a turn (default: 5)")
    parser.add_argument(
        "--settle", type=float, default=0.5, metavar="SECONDS", help="time before a turn counts (default: 0.5)"
    )
    parser.add_argument("--turns", type=int, default=1, help="turns of each rung in a repeat (default: 1)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="written by nanoflow profile: also predict gains")
    add_options(parser)
    ENGINE.add_to(parser)
    return parser


def read_task(args: argparse.Namespace) -> Task:
    """The job that the command line describes.

    Raises:
        ConfigError: An option is invalid.
    """
    if min(args.turn, args.turns, args.repeats) <= 0 or args.settle < 0:
        raise ConfigError("--turn, --turns and --repeats must be positive, --settle must not be negative")
    for workload in args.workloads:
        draw_lengths(workload, 1, 0)
    groups: dict[tuple[int, int], list[Rung]] = {}
    for rung in read_rungs(args.rungs):
        if rung.max_batch_tokens is None or rung.max_num_seqs is None:
            raise ConfigError(f"the rung {rung.name} has no limits: write {rung.name}=TOKENS/SEQS")
        groups.setdefault((rung.max_batch_tokens, rung.max_num_seqs), []).append(rung)
    return Task(
        engine=read_engine(ENGINE, args),
        groups=[groups[limits] for limits in sorted(groups, reverse=True)],
        workloads=args.workloads,
        clock=Clock(settle_s=args.settle, turn_s=args.turn, num_turns=args.turns),
        num_repeats=args.repeats,
        profile=args.profile,
    )


def run_missing(task: Task, kept: list[Run], record: Callable[[], object], time_limit_s: float | None) -> bool:
    """Measure the runs that `kept` lacks, recording after each workload; whether all runs are there in the end."""
    deadline_s = None if time_limit_s is None else time.monotonic() + time_limit_s
    is_complete = True
    for number in range(task.num_repeats):
        for group in task.groups if number % 2 == 0 else reversed(task.groups):
            missing = [
                workload
                for workload in task.workloads
                if any(task.asked(rung, workload, number) not in (run["asked"] for run in kept) for rung in group)
            ]
            try:
                for found in _run_group(task.repeat(group, missing, number, _num_pages(kept)), deadline_s):
                    for rung in group if found.reason is None else ():
                        run = run_of(found, rung.name, task.asked(rung, found.workload, number))
                        kept[:] = [other for other in kept if other["asked"] != run["asked"]] + [run]
                        print(line(run), flush=True)
                    record()
                    if found.reason is not None:
                        print(f"{found.workload}: {found.reason}", file=sys.stderr, flush=True)
                        is_complete = False
            except RunFailed as error:
                print(f"{', '.join(rung.name for rung in group)}: {error}", file=sys.stderr, flush=True)
                is_complete = False
    return is_complete


def _num_pages(runs: Sequence[Run]) -> int | None:
    """KV pages of earlier engines; None if there was none."""
    return next((int(run["settings"]["num_pages"]) for run in runs), None)


def _run_group(repeat: Repeat, deadline_s: float | None) -> Iterator[Found]:
    if not repeat.workloads:
        return iter(())
    if deadline_s is not None and time.monotonic() >= deadline_s:
        raise RunFailed("the time is over")
    return yielded_apart(run_repeat, (repeat,), len(repeat.workloads), deadline_s)


def run_of(found: Found, rung: str, asked: dict[str, Any]) -> dict[str, Any]:
    """A run as the record has it, with the same keys as a whole run."""
    run: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(
            {
                "asked": asked,
                "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
                "git_revision": git_revision(),
                "settings": found.settings[rung],
                "metrics": found.metrics[rung],
            }
        )
    )
    return run


if __name__ == "__main__":
    sys.exit(main())
