"""Runs of several settings in turn on one card, in a document that grows run by run: what is cut off is not lost.

A setting is an engine with its limits and plans, and how tokens are sampled. Repeats go through all settings, forwards
and backwards in turn, so that what drifts evenly tells for none. Who asks for which settings: `whole_runs.py`,
`limits.py`, `sampled.py`. `steady.py` writes the same record of turns on engines that rungs share.
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

from benchmarks.apart import RunFailed, run_apart
from benchmarks.document import write_json
from nanoflow.bench.options import ThroughputConfig
from nanoflow.bench.provenance import header, portable
from nanoflow.bench.record import BenchRecord
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.plan.book import load_book

Document = dict[str, Any]
Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is compared: an engine and how its tokens are sampled, under a name."""

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
        """What names this run: another one with the same is the same run."""
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
    """What names a run.

    Args:
        name: Of the setting.
        engine: With its limits and plans; the content of a plan book names it, not its file alone.
        workload: Of which a trace's folder says nothing.
        more: Everything else that another run may differ in.
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
    """The options of every benchmark that runs settings in turn."""
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the record, written after each run")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"of all (default: {repeats})")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing and end all after so long")
    parser.add_argument(
        "--fresh", action="store_true", help="forget what the record has; else only what is missing runs"
    )
    parser.add_argument(
        "--allow-dirty", action="store_true", help="write under benchmarks/results from sources without a revision"
    )


def in_order(settings: Sequence[Setting], repeats: int) -> list[Wanted]:
    """Every setting in every repeat; settings of one engine stay together, so that it is built once."""
    order = []
    for repeat in range(repeats):
        for setting in settings if repeat % 2 == 0 else reversed(settings):
            order.append(Wanted(setting=setting, repeat=repeat))
    return order


def run_in_turn(
    benchmark: str, settings: Sequence[Setting], args: argparse.Namespace, is_base: Callable[[Run], bool]
) -> int:
    """Run what is missing, print and write what it is worth; the status to exit with.

    Args:
        benchmark: Its name.
        settings: In the order of a repeat.
        args: With the options of `add_options`.
        is_base: As `results_of` has it.

    Raises:
        ConfigError: As `begin`.
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
    """Write what is known so far, with what it is worth, which is returned."""
    results = results_of(document["runs"], is_base)
    write_json(path, {**document, "is_complete": is_complete, "results": results})
    return results


def measure(
    kept: list[Run], wanted: Sequence[Wanted], record: Callable[[], object], *, time_limit_s: float | None
) -> bool:
    """Run what is missing.

    Args:
        kept: Runs that are there; more are added.
        wanted: All that shall be there.
        record: Called after each run.
        time_limit_s: Seconds after which nothing begins.

    Returns:
        Whether all is there.
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
    """The document so far, under a head of now.

    Raises:
        ConfigError: It is of another benchmark, or of another card: no two cards are compared.
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
    """Runs of one engine; one that fails is told, and the next engine has its turn."""
    if deadline_s is not None and time.monotonic() >= deadline_s:
        return
    configs = [replace(each.setting.config, repeats=1, bounds=False, json=None) for each in group]
    try:
        yield from zip(group, run_apart(group[0].setting.engine, configs, deadline_s), strict=True)
    except RunFailed as error:
        print(f"{group[0].setting.name}: {error}", file=sys.stderr, flush=True)


def run_of(wanted: Wanted, record: BenchRecord) -> dict[str, Any]:
    """A run as the document has it."""
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
    """One run for people."""
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
    """A setting on a workload, beside the setting that it is compared with.

    Attributes:
        workload, num_requests: What was asked for; None if requests come without end.
        name: Of the setting.
        limits: Token budget and requests at once, as it ran.
        num_plans: Plans that it could choose from, beside the sequential one.
        planned_part: Part of the iterations that ran one of them.
        base: Name of the setting that it is compared with.
        total_tokens_per_s: Median of the repeats, which stand in `repeats_tokens_per_s`.
        ratio: Of the medians.
        ratios: Of each repeat to the same repeat of the base: their spread.
        gains: Of each repeat, if a sequential rung had the very same batches: its time / this one's.
        energy_per_token_j: Median; None without a counter, or if one was dropped.
        num_failed, num_short: Requests that failed, or gave too few tokens: the run is not comparable.
        git_revisions: Of the sources, one if all repeats are of the same.
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
    """Every setting beside the fastest of those that it is compared with, on each workload.

    Args:
        runs: Of the document.
        is_base: Whether others are compared with a run's setting; the fastest is the base.
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
    """Iterations that ran a plan of the book; the sequential one has the digest that `fallback` says."""
    counts: list[Mapping[str, int]] = [run["metrics"]["plan_iterations"] or {} for run in runs]
    total = sum(sum(count.values()) for count in counts)
    if not total:
        return None
    fallbacks = [run["settings"]["fallback"] for run in runs]
    return 1.0 - sum(count.get(fallback, 0) for count, fallback in zip(counts, fallbacks, strict=True)) / total


def table(results: Sequence[Result]) -> str:
    """For people: a line a setting, a block a workload."""
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
