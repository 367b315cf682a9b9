"""The ablation ladder: the same requests sequentially, in nano-batches, overlapped by each mechanism, and as searched.

A rung is a plan book: none (`sequential`), every batch cut in two on one lane (`nano-batches`), the best plan of one
mechanism wherever there is something to overlap, even if it is predicted to lose (`partition`, `stream`, `beside`,
`inside`: what the profile has pairs of), and the book that `nanoflow search` makes (`searched`). From the root of the
repository:

    python -m benchmarks.ablation --profile benchmarks/results/profile_llama-3-8b_h200.json

Three steps: books and predictions (--prepare ends there, and needs no GPU), runs, one document of all records in the
folder (--merge does nothing else). What is there already stays: books/MODEL_RUNG.json, which may also be a book made by
hand, as by `nanoflow search --measure`, and records MODEL_WORKLOAD_RUNG.json unless --force is given. So a ladder can
be measured in pieces, by --rungs and --workloads. Each rung runs in a process of its own. Bounds are measured with the
sequential rung. Exit status 1 if a run or a request failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.ladder import (
    NANO_BATCHES,
    RUNGS,
    SEARCHED,
    SEQUENTIAL,
    Document,
    book_of,
    check_same,
    make_ladder,
    options_of,
    table,
)
from benchmarks.rungs import Task, label, load_predictions, make_books, predict, write_json
from benchmarks.targets import is_trace, read_workloads, record_paths, summary
from nanoflow.bench.config import ThroughputConfig
from nanoflow.bench.offline import run_workloads
from nanoflow.bench.record import BenchRecord, write_record
from nanoflow.bench.workload import draw_lengths
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.cost.table import Profile
from nanoflow.models.config import parse

WORKLOADS = ("512/512:1100", "1024/512:1400", "512/1024:1000", "1000/1000:700", "2048/128:900", "8000/1000:150")

_MEASUREMENT = OptionGroup(
    kind=ThroughputConfig,
    title="measurement",
    skip=frozenset({"workload", "num_requests", "json", "goodput"}),
    defaults={"repeats": 3},
)
ENGINE = OptionGroup(
    kind=EngineConfig,
    title="model and engine",
    skip=frozenset({"seed", "plan"}),
    defaults={"max_batch_tokens": 8192, "max_num_seqs": 2048, "dtype": "bfloat16"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the books, run what is missing, print and write the ladder."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        task = read_task(args)
        if not args.merge:
            make_books(task)
        missing = {} if args.merge or args.prepare else missing_runs(task)
        if not args.merge:
            predict(task)
    except ValueError as error:
        parser.error(str(error))
    if args.prepare:
        return 0
    failed = [rung for rung, configs in missing.items() if not run_apart(task, rung, configs)]
    try:
        merge(task)
    except ValueError as error:
        parser.error(str(error))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="file written by nanoflow profile; names the model")
    parser.add_argument("--rungs", nargs="+", metavar="RUNG", help=f"{', '.join(RUNGS)} (default: all there are)")
    parser.add_argument(
        "--workloads",
        nargs="+",
        metavar="WORKLOAD:N",
        help="IN/OUT or trace:FILE.csv, each with its number of requests in one repeat "
        f"(default: {' '.join(WORKLOADS)}, those that the model is long enough for)",
    )
    parser.add_argument(
        "--json-folder", type=Path, default=Path("benchmarks/results/ladder"), metavar="DIR", help="folder of all files"
    )
    parser.add_argument("--force", action="store_true", help="run again what has a record")
    parser.add_argument("--git-revision", metavar="TEXT", help="of the sources, where they are a copy without git")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--prepare", action="store_true", help="only make books and predictions")
    only.add_argument("--merge", action="store_true", help="only make one document of the records in the folder")
    _MEASUREMENT.add_to(parser)
    ENGINE.add_to(parser)
    return parser


def read_task(args: argparse.Namespace) -> Task:
    """What the command line asks for; ValueError if that makes no sense."""
    profile, engine = read_engine(args)
    texts = args.workloads or [text for text in WORKLOADS if is_short_enough(text.rpartition(":")[0], profile)]
    workloads = read_workloads(argparse.Namespace(**{**_MEASUREMENT.defaults, **vars(args), "workloads": texts}))
    record_paths(args.json_folder, engine.model, [config.workload for config in workloads])
    for config in workloads:
        check_length(config.workload, profile)
    return Task(
        profile=profile,
        engine=engine,
        workloads=tuple(workloads),
        rungs=read_rungs(args.rungs, profile),
        folder=args.json_folder,
        is_forced=args.force,
        git_revision=args.git_revision,
    )


def read_engine(args: argparse.Namespace) -> tuple[Profile, EngineConfig]:
    """The profile, and the engine on its model; ConfigError if another model is asked for."""
    profile = Profile.load(args.profile)
    engine = ENGINE.read(argparse.Namespace(**{"model": profile.model, **vars(args)}))
    if engine.model != profile.model:
        raise ConfigError(f"the profile is of {profile.model}, not of {engine.model}")
    return profile, engine


def read_rungs(names: Sequence[str] | None, profile: Profile) -> tuple[str, ...]:
    """The rungs asked for, in the ladder's order; all that the profile has pairs of if none are named."""
    mechanisms = {pair.mechanism.value for pair in profile.pairs}
    there = [rung for rung in RUNGS if rung in (SEQUENTIAL, NANO_BATCHES, SEARCHED) or rung in mechanisms]
    for name in names or ():
        if name not in RUNGS:
            raise ConfigError(f"there is no rung {name!r}; known: {', '.join(RUNGS)}")
        if name not in there:
            raise ConfigError(f"the profile has no pairs of {name}; it has {', '.join(there)}")
    return tuple(rung for rung in there if not names or rung in names)


def is_short_enough(workload: str, profile: Profile) -> bool:
    """Whether the model is long enough for it; says so if not."""
    try:
        check_length(workload, profile)
    except ConfigError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def check_length(workload: str, profile: Profile) -> None:
    """ConfigError if a request is longer than the model allows."""
    limit = parse(profile.config, origin=profile.model).max_context_len
    for length in set(draw_lengths(workload, 1, 0)) if not is_trace(workload) else ():
        if (longest := length.num_prompt_tokens + length.num_output_tokens) > limit:
            raise ConfigError(f"{workload}: {profile.model} is for {limit:,} tokens, a request has {longest:,}")


def missing_runs(task: Task) -> dict[str, list[ThroughputConfig]]:
    """By rung, the workloads that have no record; ConfigError if there is one of another run."""
    missing = {}
    for rung in task.rungs:
        configs = [config for config in task.workloads if task.is_forced or not has_record(task, config, rung)]
        if configs:
            missing[rung] = configs
    return missing


def has_record(task: Task, config: ThroughputConfig, rung: str) -> bool:
    """True if there is one of exactly this run; ConfigError if it is of another one."""
    path = task.record_path(config, rung)
    if not path.exists():
        return False
    record = json.loads(path.read_bytes())
    book = task.book(rung).digest
    try:
        check_same(str(path), {**options_of(record), "book": book_of(record)}, {**task.options(config), "book": book})
    except ConfigError as error:
        raise ConfigError(f"{error}; --force runs it again") from None
    return True


def run_apart(task: Task, rung: str, configs: Sequence[ThroughputConfig]) -> bool:
    """Run a rung in a process of its own, which leaves a clean device whatever happens; False if something failed."""
    process = multiprocessing.get_context("spawn").Process(target=run_rung, args=(task, rung, configs))
    process.start()
    process.join()
    return process.exitcode == 0


def run_rung(task: Task, rung: str, configs: Sequence[ThroughputConfig]) -> None:
    """All workloads on one engine; a record each, as soon as it is there. Exits with status 1 if something failed."""
    path = task.book_path(rung)
    engine = replace(task.engine, plan=None if path is None else str(path))
    # Bounds know no plan.
    asked = [replace(config, bounds=config.bounds and rung == SEQUENTIAL) for config in configs]
    num_failed = 0
    try:
        for config, record in zip(configs, run_workloads(engine, asked), strict=True):
            print(f"{rung}: {summary(record)}", flush=True)
            write_record(cleaned(record, task.git_revision), task.record_path(config, rung))
            num_failed += sum(run.num_failed for run in record.repeats)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"{rung}: {error}") from error
    if num_failed:
        raise SystemExit(1)


def cleaned(record: BenchRecord, git_revision: str | None) -> BenchRecord:
    """Without the folders of trace and book, which say nothing of the run; with the revision, if git knows none."""
    plan = record.config.plan
    software = record.software
    return replace(
        record,
        workload=replace(record.workload, workload=label(record.workload.workload)),
        config=replace(record.config, plan=None if plan is None else Path(plan).name),
        software=replace(software, git_revision=software.git_revision or git_revision),
    )


def merge(task: Task) -> None:
    """Print and write the ladder of all records of the model in the folder."""
    ladder = make_ladder(load_records(task), list(load_predictions(task).values()))
    print(table(ladder))
    path = task.folder / f"ladder_{task.model}.json"
    write_json(path, ladder)
    print(f"\n{path}: {sum(len(workload.rungs) for workload in ladder.workloads)} records")


def load_records(task: Task) -> dict[str, Document]:
    """By file name."""
    paths = sorted(task.folder.glob(f"{task.model}_*_*.json"))
    records = {path.name: json.loads(path.read_bytes()) for path in paths}
    return {name: record for name, record in records.items() if record["config"]["model"] == task.engine.model}


if __name__ == "__main__":
    sys.exit(main())
