"""The ablation ladder as a document: what each rung is worth beside the sequential one, and beside its prediction.

Pure functions from the records of runs, as `nanoflow bench throughput` writes them, to one document and a table.
Runs and predictions are made by `ablation.py`; `tools/benchmarks_page.py` writes the document into docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nanoflow.config import ConfigError

LADDER_VERSION = 1
SEQUENTIAL, NANO_BATCHES, SEARCHED = "sequential", "nano-batches", "searched"
# From the baseline upwards.
RUNGS = (SEQUENTIAL, NANO_BATCHES, "stream", "beside", "partition", "inside", SEARCHED)
# What makes two runs comparable: of the workload, and of the engine.
_ASKED, _ENGINE = ("num_requests", "seed"), ("max_batch_tokens", "max_num_seqs", "gpu_memory_utilization", "dtype")

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the simulator says of a workload under the book of a rung.

    Attributes:
        workload, rung: Their names.
        book, profile: Digests.
        options: As `options_of` a record.
        total_tokens_per_s, energy_per_token_j: Simulated.
    """

    workload: str
    rung: str
    book: str
    profile: str
    options: Mapping[str, Any]
    total_tokens_per_s: float = 0.0
    energy_per_token_j: float | None = None

    @property
    def key(self) -> str:
        """Names the run that it is of."""
        return run_key(self.workload, self.rung, self.book, self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A workload under one book.

    Attributes:
        rung: Its name.
        record: File of the run's record.
        created_utc, git_revision: Of the record.
        book: Digest of the plan book.
        plans: Name and digest of the plans that ran, beside the sequential one.
        total_tokens_per_s: Mean of the repeats, which stand in `total_tokens_per_s_repeats`.
        ratio_to_sequential: Of the rates; None without a sequential run.
        share_of_optimal, share_of_serial: Rate as a part of the bounds; None if these were not measured.
        energy_per_token_j, power_w: Mean of the repeats; None without a counter.
        steady_tokens_per_s, steady_energy_per_token_j: Of the steady state, mean of the repeats; None if one has none.
        planned_part: Part of the iterations that did not run sequentially; None if nobody watched.
        predicted_tokens_per_s, predicted_ratio, predicted_energy_per_token_j: Simulated; None if they were not.
        num_failed, num_short: Requests that failed, or gave too few tokens: the run is not comparable.
    """

    rung: str
    record: str
    created_utc: str
    git_revision: str | None
    book: str | None
    plans: Sequence[Mapping[str, str]]
    total_tokens_per_s: float
    total_tokens_per_s_repeats: Sequence[float]
    ratio_to_sequential: float | None
    share_of_optimal: float | None
    share_of_serial: float | None
    energy_per_token_j: float | None
    power_w: float | None
    steady_tokens_per_s: float | None
    steady_energy_per_token_j: float | None
    planned_part: float | None
    predicted_tokens_per_s: float | None
    predicted_ratio: float | None
    predicted_energy_per_token_j: float | None
    num_failed: int
    num_short: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRungs:
    """All rungs of one workload, and its bounds in tokens/s (None if they were not measured)."""

    workload: str
    num_requests: int
    serial_tokens_per_s: float | None
    optimal_tokens_per_s: float | None
    rungs: Sequence[Rung]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The document; machine and software are those of the newest record, `git_revisions` those of all."""

    model: str
    weights: str
    options: Mapping[str, Any]
    machine: Document
    software: Document
    git_revisions: Sequence[str]
    workloads: Sequence[WorkloadRungs]
    benchmark: str = "ablation"
    version: int = LADDER_VERSION


def options_of(record: Document) -> dict[str, Any]:
    """The options that two runs must share to be compared."""
    asked, engine = record["workload"], record["config"]
    return {**{key: asked[key] for key in _ASKED}, **{key: engine[key] for key in _ENGINE}}


def book_of(record: Document) -> str | None:
    """Digest of the plan book that a run chose from."""
    book = record["model"].get("book")
    return None if book is None else str(book["digest"])


def run_key(workload: str, rung: str, book: str | None, options: Mapping[str, Any]) -> str:
    """Names a run, of a record or of a prediction."""
    return ", ".join([workload, rung, str(book), *(f"{key}={value}" for key, value in sorted(options.items()))])


def make_ladder(records: Mapping[str, Document], predictions: Sequence[Prediction]) -> Ladder:
    """The document of all records of a model.

    Args:
        records: By file name; `MODEL_WORKLOAD_RUNG.json`, where RUNG has no underscore.
        predictions: Those that fit no record are left out.

    Raises:
        ConfigError: There is no record, or records cannot be compared.
    """
    if not records:
        raise ConfigError("there is no record to merge")
    newest = max(records.values(), key=lambda record: str(record["created_utc"]))
    for name, record in records.items():
        if (here := _card(record)) != (there := _card(newest)):
            raise ConfigError(f"{name} was measured on {here}, others on {there}")
    by_workload: dict[str, dict[str, str]] = {}
    for name, record in records.items():
        by_workload.setdefault(record["workload"]["workload"], {})[rung_of(name)] = name
    return Ladder(
        model=newest["config"]["model"],
        weights=newest["model"]["weights"],
        options={key: newest["config"][key] for key in _ENGINE},
        machine=newest["machine"],
        software=newest["software"],
        git_revisions=sorted({str(record["software"]["git_revision"] or "unknown") for record in records.values()}),
        workloads=[_workload(names, records, predictions) for names in sorted(by_workload.values(), key=_place)],
    )


def rung_of(name: str) -> str:
    """The rung that a record's file is named after."""
    return name.removesuffix(".json").rpartition("_")[2]


def _place(names: Mapping[str, str]) -> tuple[bool, list[int], str]:
    """Constant lengths first, short ones before long ones."""
    workload = min(names.values()).removesuffix(".json").rpartition("_")[0].rpartition("_")[2]
    lengths = workload.split("-")
    is_constant = all(length.isdecimal() for length in lengths)
    return (not is_constant, [int(length) for length in lengths] if is_constant else [], workload)


def _card(record: Document) -> str:
    """What must be the same for rates to be compared."""
    gpus = record["machine"]["gpus"]
    if not gpus:
        return str(record["machine"]["cpu_name"])
    gpu = gpus[0]
    return f"{len(gpus)} x {gpu['name']} ({gpu['power_limit_w']} W, driver {gpu['driver_version']})"


def _workload(
    names: Mapping[str, str], records: Mapping[str, Document], predictions: Sequence[Prediction]
) -> WorkloadRungs:
    order = sorted(names, key=lambda rung: (RUNGS.index(rung) if rung in RUNGS else len(RUNGS), rung))
    found = [records[names[rung]] for rung in order]
    for rung, record in zip(order, found, strict=True):
        check_same(names[rung], options_of(record), options_of(found[0]))
    bounds = next((record["bounds"] for record in found if record.get("bounds")), None)
    sequential = _rates(records[names[SEQUENTIAL]]) if SEQUENTIAL in names else None
    predicted = {rung: _predicted(rung, record, predictions) for rung, record in zip(order, found, strict=True)}
    return WorkloadRungs(
        workload=found[0]["workload"]["workload"],
        num_requests=found[0]["workload"]["num_requests"],
        serial_tokens_per_s=bounds and bounds["serial_tokens_per_s"],
        optimal_tokens_per_s=bounds and bounds["optimal_tokens_per_s"],
        rungs=[
            _rung(names[rung], record, bounds, sequential, (predicted[rung], predicted.get(SEQUENTIAL)))
            for rung, record in zip(order, found, strict=True)
        ],
    )


def check_same(name: str, options: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ConfigError that names the first option in which a record differs from what it is compared with."""
    for key, value in wanted.items():
        if options[key] != value:
            raise ConfigError(f"{name} is of another run: {key} is {options[key]}, not {value}")


def _predicted(rung: str, record: Document, predictions: Iterable[Prediction]) -> Prediction | None:
    """The prediction of exactly this run."""
    key = run_key(record["workload"]["workload"], rung, book_of(record), options_of(record))
    return next((each for each in predictions if each.key == key), None)


def _rung(
    name: str,
    record: Document,
    bounds: Document | None,
    sequential: Sequence[float] | None,
    predicted: tuple[Prediction | None, Prediction | None],
) -> Rung:
    rates, own, base = _rates(record), *predicted
    rate = fmean(rates)
    energies_j = [run["energy_per_token_j"] for run in record["repeats"]]
    is_metered = None not in energies_j
    book = record["model"].get("book")
    return Rung(
        rung=rung_of(name),
        record=name,
        created_utc=record["created_utc"],
        git_revision=record["software"]["git_revision"],
        book=book_of(record),
        plans=[] if book is None else book["plans"][1:],
        total_tokens_per_s=rate,
        total_tokens_per_s_repeats=rates,
        ratio_to_sequential=None if sequential is None else rate / fmean(sequential),
        share_of_optimal=None if bounds is None else rate / bounds["optimal_tokens_per_s"],
        share_of_serial=None if bounds is None else rate / bounds["serial_tokens_per_s"],
        energy_per_token_j=fmean(energies_j) if is_metered else None,
        power_w=fmean(map(math.prod, zip(energies_j, rates, strict=True))) if is_metered else None,
        steady_tokens_per_s=_steady(record, "total_tokens_per_s"),
        steady_energy_per_token_j=_steady(record, "energy_per_token_j"),
        planned_part=_planned_part(record),
        predicted_tokens_per_s=None if own is None else own.total_tokens_per_s,
        predicted_ratio=None if own is None or base is None else own.total_tokens_per_s / base.total_tokens_per_s,
        predicted_energy_per_token_j=None if own is None else own.energy_per_token_j,
        num_failed=sum(run["num_failed"] for run in record["repeats"]),
        num_short=sum(run["num_short"] for run in record["repeats"]),
    )


def _rates(record: Document) -> list[float]:
    return [run["total_tokens_per_s"] for run in record["repeats"]]


def _steady(record: Document, name: str) -> float | None:
    """Mean over the steady states of the repeats."""
    found = [run["steady"][name] for run in record["repeats"] if run.get("steady")]
    return None if len(found) < len(record["repeats"]) or None in found else fmean(found)


def _planned_part(record: Document) -> float | None:
    """The fallback stands first among the plans of a book."""
    counts = [run.get("plan_iterations") for run in record["repeats"]]
    if None in counts or not record["model"].get("book"):
        return None
    fallback = record["model"]["book"]["plans"][0]["digest"]
    total = sum(sum(count.values()) for count in counts)
    return 1.0 - sum(count.get(fallback, 0) for count in counts) / total if total else None


def table(ladder: Ladder) -> str:
    """The ladder for people: a block a workload, a line a rung."""
    return "\n\n".join("\n".join(_block(workload)) for workload in ladder.workloads)


def _block(workload: WorkloadRungs) -> Iterator[str]:
    bounds = ""
    if workload.serial_tokens_per_s is not None and workload.optimal_tokens_per_s is not None:
        bounds = (
            f"; serial bound {workload.serial_tokens_per_s:,.0f}, optimal {workload.optimal_tokens_per_s:,.0f} tokens/s"
        )
    yield f"{workload.workload} x {workload.num_requests:,}{bounds}"
    yield (
        f"  {'rung':<14}{'tokens/s':>10}{'(least to most)':>22}{'ratio':>8}{'predicted':>11}{'% optimal':>11}"
        f"{'% serial':>10}{'mJ/token':>10}{'W':>6}{'steady':>9}{'mJ':>6}{'planned':>9}"
    )
    for rung in workload.rungs:
        least, most = min(rung.total_tokens_per_s_repeats), max(rung.total_tokens_per_s_repeats)
        wrong = f"  {rung.num_failed} FAILED" if rung.num_failed else ""
        wrong += f"  {rung.num_short} SHORT" if rung.num_short else ""
        yield (
            f"  {rung.rung:<14}{rung.total_tokens_per_s:>10,.0f}{f'({least:,.0f} to {most:,.0f})':>22}"
            f"{_number(rung.ratio_to_sequential, '.3f'):>8}{_number(rung.predicted_ratio, '.3f'):>11}"
            f"{_number(rung.share_of_optimal, '.1f', 100):>11}{_number(rung.share_of_serial, '.1f', 100):>10}"
            f"{_number(rung.energy_per_token_j, '.1f', 1e3):>10}{_number(rung.power_w, '.0f'):>6}"
            f"{_number(rung.steady_tokens_per_s, ',.0f'):>9}{_number(rung.steady_energy_per_token_j, '.1f', 1e3):>6}"
            f"{_number(rung.planned_part, '.0%'):>9}{wrong}"
        )


def _number(value: float | None, digits: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, digits)
