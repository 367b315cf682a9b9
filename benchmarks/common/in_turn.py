"""Runs several settings in turn on one card; the record is written after each run, so an interruption loses nothing.

A setting is an engine with its limits and plans, and how tokens are sampled. The order of the settings is reversed in
every second repeat, so that a linear drift of the machine affects all of them equally. `ladder/whole_runs.py`,
`engine/limits.py` and `engine/sampled.py` say which settings run. `ladder/steady.py` writes the same kind of record.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.common.apart import RunFailed, run_apart
from benchmarks.common.document import write_json
from nanoflow.bench.options import ThroughputConfig
from nanoflow.bench.provenance import header, portable
from nanoflow.bench.record import BenchRecord
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.plan.book import load_book

Document = dict[str, Any]
Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """An engine and how its tokens are sampled, under the name that results have."""

    name: str
    engine: EngineConfig
    config: ThroughputConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One run of a setting."""

    setting: Setting
    repeat: int

    @property
    def asked(self) -> dict[str, Any]:
        """The key of this run: a run in the record with the same key is not run again."""
        config = self.setting.config
        return asked_of(
            self.setting.name,
            self.setting.engine,
            workload=config.workload,
            num_requests=config.num_requests,
            seed=config.seed,
            sampling=config.sampling,
            text=config.text,
            repeat=self.repeat,
        )


def asked_of(name: str, engine: EngineConfig, *, workload: str, **more: Any) -> dict[str, Any]:
    """The key of a run: everything in which another run may differ.

    Args:
        name: Name of the setting.
        engine: Options of the engine. A plan book counts by its content too, not by the name of its file alone.
        workload: IN/OUT or trace:FILE; the folder of the file is left out.
        more: All else, by name.
    """
    plain: dict[str, Any] = msgspec.to_builtins(engine)
    return {
        "name": name,
        "workload": portable(workload),
        **more,
        "engine": {key: portable(value) if isinstance(value, str) else value for key, value in plain.items()},
        "book": None if engine.plan is None else load_book(Path(engine.plan)).digest,
    }


def add_options(parser: argparse.ArgumentParser, repeats: int = 3) -> None:
    """Add the options of every benchmark that runs settings in turn."""
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the record, written after each run")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"of all runs (default: {repeats})")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop after this time")
    parser.add_argument(
        "--fresh", action="store_true", help="measure everything again; else only what the record lacks"
    )
    parser.add_argument(
        "--allow-dirty", action="store_true", help="write under benchmarks/results from sources without a revision"
    )


def in_order(settings: Sequence[Setting], repeats: int) -> list[Wanted]:
    """Every setting in every repeat. Settings of one engine are neighbours, so that the engine is built once."""
    order = []
    for repeat in range(repeats):
        for setting in settings if repeat % 2 == 0 else reversed(settings):
            order.append(Wanted(setting=setting, repeat=repeat))
    return order


def run_in_turn(
    benchmark: str, settings: Sequence[Setting], args: argparse.Namespace, is_base: Callable[[Run], bool]
) -> int:
    """Measure what the record lacks, then print and write the results.

    Args:
        benchmark: Its name in the record.
        settings: In the order of a repeat.
        args: Parsed options of `add_options`.
        is_base: See `results_of`.

    Returns:
        Exit status: 1 if a run is missing or a request failed, else 0.

    Raises:
        ConfigError: See `begin`.
    """
    order = in_order(settings, args.repeats)
    document = begin(benchmark, args.json, is_fresh=args.fresh)
    record = partial(write_record, args.json, document, is_base)
    is_complete = measure(document["runs"], order, record, time_limit_s=args.time_limit)
    results = record(is_complete=is_complete)
    print(table(results))
    return 0 if is_complete and not any(each.num_failed for each in results) else 1


def write_record(
    path: Path, document: Document, is_base: Callable[[Run], bool], *, is_complete: bool = False
) -> list[Result]:
    """Write the runs so far with their results, and return the results."""
    results = results_of(document["runs"], is_base)
    write_json(path, {**document, "is_complete": is_complete, "results": results})
    return results


def measure(
    kept: list[Run], wanted: Sequence[Wanted], record: Callable[[], object], *, time_limit_s: float | None
) -> bool:
    """Measure the runs that are missing.

    Args:
        kept: Runs of the record; new ones are appended.
        wanted: All runs that the record shall have.
        record: Called after each run.
        time_limit_s: Seconds after which no run starts.

    Returns:
        Whether the record has all runs.
    """
    deadline_s = None if time_limit_s is None else time.monotonic() + time_limit_s
    missing = [each for each in wanted if not any(run["asked"] == each.asked for run in kept)]
    for _, group in groupby(missing, key=lambda each: each.setting.engine):
        for each, measured in _run_group(list(group), deadline_s):
            run = run_of(each, measured)
            kept.append(run)
            print(line(run), flush=True)
            record()
    return all(any(run["asked"] == each.asked for run in kept) for each in wanted)


def begin(benchmark: str, path: Path, *, is_fresh: bool) -> Document:
    """The record so far, with the header of this process; without runs if there is no file or `is_fresh`.

    Raises:
        ConfigError: The file is of another benchmark or was measured on another card, which is not comparable.
    """
    head: Document = msgspec.json.decode(msgspec.json.encode(header(benchmark)))
    if is_fresh or not path.exists():
        return {**head, "runs": []}
    stored = msgspec.json.decode(path.read_bytes())
    if stored.get("benchmark") != benchmark or "runs" not in stored:
        raise ConfigError(f"{path} is no record of {benchmark}: name another file, or give --fresh")
    if stored["machine"]["gpus"] != head["machine"]["gpus"]:
        raise ConfigError(f"{path} was measured on another card: name another file, or give --fresh")
    return {**head, "runs": stored["runs"]}


def _run_group(group: Sequence[Wanted], deadline_s: float | None) -> Iterator[tuple[Wanted, BenchRecord]]:
    """Runs of one engine. A failure is printed, and ends the runs of this engine alone."""
    if deadline_s is not None and time.monotonic() >= deadline_s:
        return
    configs = [replace(each.setting.config, repeats=1, bounds=False, json=None) for each in group]
    try:
        yield from zip(group, run_apart(group[0].setting.engine, configs, deadline_s), strict=True)
    except RunFailed as error:
        print(f"{group[0].setting.name}: {error}", file=sys.stderr, flush=True)


def run_of(wanted: Wanted, record: BenchRecord) -> dict[str, Any]:
    """A run as the record has it."""
    (metrics,) = record.repeats
    plain: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(
            {
                "asked": wanted.asked,
                "created_utc": record.created_utc,
                "git_revision": record.software.git_revision,
                "settings": record.settings,
                "metrics": metrics,
            }
        )
    )
    return plain


def line(run: Run) -> str:
    """One run as a line of text."""
    asked, metrics, settings = run["asked"], run["metrics"], run["settings"]
    energy = "" if metrics["energy_per_token_j"] is None else f", {metrics['energy_per_token_j'] * 1e3:.1f} mJ/token"
    failed = f", {metrics['num_failed']} FAILED" if metrics["num_failed"] else ""
    limits = f"{settings['max_batch_tokens']}/{settings['max_num_seqs']}"
    gain = "" if metrics.get("gain") is None else f", {metrics['gain']:.3f} times sequential on the same batches"
    return (
        f"{asked['repeat']}: {asked['name']} ({limits}), {_named(asked['workload'], asked['num_requests'])}: "
        f"{metrics['total_tokens_per_s']:,.0f} tok/s{gain}{energy}{failed}"
    )


def _named(workload: str, num_requests: int | None) -> str:
    return workload if num_requests is None else f"{workload} x {num_requests:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A setting on a workload, compared with the base: the setting that the others are compared with.

    Attributes:
        workload, num_requests: The workload; `num_requests` is None if requests arrive without end.
        name: Name of the setting.
        limits: TOKENS/SEQS: token budget and requests at once, as it ran.
        num_plans: Plans in its book, without the sequential one.
        planned_part: Iterations that ran one of these plans / all iterations; None if unknown.
        base: Name of the base.
        total_tokens_per_s: Median of `repeats_tokens_per_s`; prompt and output tokens.
        ratio: Median tokens/s / that of the base.
        ratios: The same for each repeat that the base has too.
        gains: For each repeat, time of a sequential rung / time of this setting, if both had the same batches.
        energy_per_token_j: Median over repeats; None without a counter, or if a repeat has no valid energy.
        num_failed, num_short: Requests that failed, or returned too few tokens; with any the run is not comparable.
        git_revisions: Revisions of the sources, without duplicates.
    """

    workload: str
    num_requests: int | None
    name: str
    limits: str
    num_plans: int
    planned_part: float | None
    base: str
    total_tokens_per_s: float
    repeats_tokens_per_s: Sequence[float]
    ratio: float
    ratios: Sequence[float]
    gains: Sequence[float]
    energy_per_token_j: float | None
    num_failed: int
    num_short: int
    git_revisions: Sequence[str | None]


def results_of(runs: Sequence[Run], is_base: Callable[[Run], bool]) -> list[Result]:
    """Every setting on every workload, compared with the base of the workload.

    Args:
        runs: Runs of the record.
        is_base: Whether the setting of a run may be the base; the fastest of these is.
    """
    found = []
    for workload in dict.fromkeys(_workload_of(run) for run in runs):
        named: dict[str, list[Run]] = {}
        for run in runs:
            if _workload_of(run) == workload:
                named.setdefault(run["asked"]["name"], []).append(run)
        there = [name for name, own in named.items() if is_base(own[0])]
        if there:
            base = max(there, key=lambda name: median(_rates(named[name])))
            found += [_result(name, own, base, named[base]) for name, own in named.items()]
    return found


def _workload_of(run: Run) -> tuple[str, int | None]:
    return run["asked"]["workload"], run["asked"]["num_requests"]


def _rates(runs: Sequence[Run]) -> list[float]:
    return [run["metrics"]["total_tokens_per_s"] for run in runs]


def _result(name: str, own: Sequence[Run], base: str, base_runs: Sequence[Run]) -> Result:
    settings, metrics = own[0]["settings"], [run["metrics"] for run in own]
    by_repeat = {run["asked"]["repeat"]: run["metrics"]["total_tokens_per_s"] for run in base_runs}
    energies = [each["energy_per_token_j"] for each in metrics]
    return Result(
        workload=own[0]["asked"]["workload"],
        num_requests=own[0]["asked"]["num_requests"],
        name=name,
        limits=f"{settings['max_batch_tokens']}/{settings['max_num_seqs']}",
        num_plans=settings["num_plans"],
        planned_part=_planned_part(own),
        base=base,
        total_tokens_per_s=median(_rates(own)),
        repeats_tokens_per_s=_rates(own),
        ratio=median(_rates(own)) / median(_rates(base_runs)),
        ratios=[
            run["metrics"]["total_tokens_per_s"] / by_repeat[run["asked"]["repeat"]]
            for run in own
            if run["asked"]["repeat"] in by_repeat
        ],
        gains=[each["gain"] for each in metrics if each.get("gain") is not None],
        energy_per_token_j=None if None in energies else median(energies),
        num_failed=sum(each["num_failed"] for each in metrics),
        num_short=sum(each["num_short"] for each in metrics),
        git_revisions=list(dict.fromkeys(run["git_revision"] for run in own)),
    )


def _planned_part(runs: Sequence[Run]) -> float | None:
    """Iterations that ran a plan of the book / all; `fallback` is the digest of the sequential plan."""
    counts: list[Mapping[str, int]] = [run["metrics"]["plan_iterations"] or {} for run in runs]
    total = sum(sum(count.values()) for count in counts)
    if not total:
        return None
    fallbacks = [run["settings"]["fallback"] for run in runs]
    return 1.0 - sum(count.get(fallback, 0) for count, fallback in zip(counts, fallbacks, strict=True)) / total


def table(results: Sequence[Result]) -> str:
    """A table as text: a block for each workload, a line for each setting."""
    lines = []
    for workload, group in groupby(results, key=lambda each: (each.workload, each.num_requests)):
        lines.append(_named(*workload))
        for each in group:
            least, most = min(each.ratios, default=each.ratio), max(each.ratios, default=each.ratio)
            energy = "" if each.energy_per_token_j is None else f"{each.energy_per_token_j * 1e3:8.1f} mJ/token"
            wrong = f"  {each.num_failed} FAILED" if each.num_failed else ""
            same = f"  same batches {median(each.gains):.3f}" if each.gains else ""
            lines.append(
                f"  {each.name:<28}{each.limits:>12}{each.total_tokens_per_s:>10,.0f} tok/s{each.ratio:>8.3f} of "
                f"{each.base} ({least:.3f} to {most:.3f}){same}{energy}{wrong}"
            )
    return "\n".join(lines)
