"""Parts of docs/benchmarks.md from records of a time when all rungs had the same limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from docs import spread
from records import Document, place_of, revision_of
from tables import ran
from tables import table as _table

_LADDER = """\
Measured in November 2026, before rungs had limits of their own: every rung, the sequential one too, at the limits that
plans were searched for, which are not those at which the sequential engine is best. `benchmarks.whole_runs` and
`benchmarks.steady` have taken its place. The same requests under one plan book after the other: `sequential` has no
plan; `nano-batches` cuts every batch in two on one lane, which is what overlapping costs before it gains anything;
`stream`, `beside`, `partition` and `inside` run, for each kind of batch, the best plan of that mechanism, even where it
is predicted to lose; `searched` is what `nanoflow search` chose, sequential wherever nothing won. *Steady* is the run
without ramp and drain (`bench/steady.py`). *Planned* is the part of the iterations that did not run sequentially,
*plans* how many the book has. The prediction is a simulation of the whole run from the profile
(`bench/simulation.py`)."""

_OLD_STEADY = """\
Measured in November 2026 with the same limits for all rungs, on one engine and with the very same batches. *Gain* is
the time of the sequential rung / that of this one, *energy* a part of the sequential rung's, *predicted* the profile's
gain on these very batches. Tokens/s are those that the model worked through, prompt and output tokens; numbers are
means of the repeats (least to most). The bounds are of the whole workload: where its batches swing, turns with more
prompts, or fewer, come nearer to them than others."""


def history_parts(results: Path) -> Iterator[str]:
    """Every old ladder and every old steady state in a folder, each kind under a heading that says so."""
    ladders = _documents(results, "ladder_*.json")
    if ladders:
        yield from ("## History: the ablation ladder", _LADDER)
    for path, ladder in ladders:
        yield from ladder_parts(path, ladder)
    steady = [(path, document) for path, document in _documents(results, "steady_*.json") if is_old(document)]
    if steady:
        yield from ("## History: the steady state, rung by rung", _OLD_STEADY)
    for path, document in steady:
        yield from steady_parts(path, document)


def _documents(results: Path, pattern: str) -> list[tuple[Path, Document]]:
    """By their places in the folder."""
    paths = sorted(results.rglob(pattern))
    return [(path.relative_to(results), json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def is_old(document: Document) -> bool:
    """Whether rungs stand under workloads, all at the same limits; newer records have runs in turn."""
    return "workloads" in document


def ladder_parts(path: Path, ladder: Document) -> Iterator[str]:
    """One ladder: where it was measured, a table a workload, and measured beside predicted."""
    options, packages = ladder["options"], ladder["software"]["packages"]
    yield f"### {ladder['model'].removeprefix('preset:')} on {place_of(ladder['machine'])}"
    yield (
        f"{ladder['weights'].capitalize()} weights, {options['dtype']}, token budget {options['max_batch_tokens']:,}, "
        f"at most {options['max_num_seqs']:,} requests at once; torch {packages['torch']}, "
        f"CUDA {ladder['software']['cuda']}, triton {packages['triton']}; revision "
        f"{', '.join(map(_known, ladder['git_revisions']))}; [JSON](../benchmarks/results/{path.as_posix()})."
    )
    for workload in ladder["workloads"]:
        yield _heading(workload)
        yield "\n".join(_table(_RUNG_HEADINGS, [_rung_row(rung) for rung in workload["rungs"]]))
    rows = [row for workload in ladder["workloads"] for row in _predicted_rows(workload)]
    if rows:
        yield "**Measured and predicted**"
        yield "\n".join(_table(_PREDICTED_HEADINGS, rows))


def steady_parts(path: Path, document: Document) -> Iterator[str]:
    """Rungs in turn: where they were measured, and a table of all workloads."""
    options, packages = document["options"], document["software"]["packages"]
    model, budget = document["model"].removeprefix("preset:"), options["max_batch_tokens"]
    yield f"### {model}, token budget {budget:,}, on {place_of(document['machine'])}"
    yield (
        f"{options['dtype'].capitalize()}, at most {options['max_num_seqs']:,} requests at once; "
        f"torch {packages['torch']}, CUDA {document['software']['cuda']}, triton {packages['triton']}; "
        f"[JSON](../benchmarks/results/{path.as_posix()})."
    )
    rows = [_steady_row(workload, rung) for workload in document["workloads"] for rung in workload["rungs"]]
    yield "\n".join(_table(_STEADY_HEADINGS, rows))
    weighed = [workload["workload"] for workload in document["workloads"] if not workload["has_same_batches"]]
    if weighed:
        yield (
            "Measured before rungs had the same batches, so that gain and energy are of batches that weigh the same "
            "(as they are predicted to take sequentially, corrected by what sequential turns took), and tokens/s and "
            f"mJ/token of other mixes of prompts and decodes: {', '.join(weighed)}."
        )


def _steady_row(workload: Document, rung: Document) -> list[str]:
    rate, energies, ratios = mean(rung["tokens_per_s"]), rung["energy_per_token_j"], rung["energy_ratios"]
    serial, optimal = workload["serial_tokens_per_s"], workload["optimal_tokens_per_s"]
    return [
        workload["workload"],
        ran(rung["rung"], rung["planned_part"]),
        spread(rung["tokens_per_s"], ",.0f", "", mean),
        spread(rung["gains"], ".3f", "", mean),
        f"{rung['predicted_gain']:.3f}",
        spread(ratios or [], ".3f", "", mean),
        "" if optimal is None else f"{rate / optimal:.1%}",
        "" if serial is None else f"{rate / serial:.1%}" + (" (no bound)" if rate > serial else ""),
        "" if energies is None else f"{mean(energies) * 1e3:.1f}",
        f"{rung['planned_part']:.0%}",
        f"{rung['iteration_tokens']:,.0f}",
        f"{rung['prompt_part']:.0%}",
        f"{rung['decode_context']:,.0f}",
        f"{len(rung['gains'])} x {workload['num_turns']} x {workload['turn_s']:g} s",
        revision_of(workload["git_revision"]),
    ]


_STEADY_HEADINGS = (
    *(
        "workload",
        "rung",
        "tokens/s",
        "gain",
        "predicted",
        "energy",
        "of optimum",
        "of parts alone",
        "mJ/token",
        "planned",
    ),
    *("tokens an iteration", "of prompts", "keys a decode", "turns", "revision"),
)
_RUNG_HEADINGS = (
    *("rung", "tokens/s, mean (least to most)", "of sequential", "predicted", "% of optimum", "% of parts alone"),
    *("mJ/token", "W", "steady tokens/s", "steady mJ/token", "planned", "plans"),
)
_PREDICTED_HEADINGS = (
    *("workload", "rung", "tokens/s", "predicted", "error", "of sequential", "predicted", "difference"),
    *("mJ/token", "predicted"),
)


def _heading(workload: Document) -> str:
    text = f"**{workload['workload']}**, {workload['num_requests']:,} requests"
    if workload["serial_tokens_per_s"] is None:
        return f"{text}:"
    serial, optimal = workload["serial_tokens_per_s"], workload["optimal_tokens_per_s"]
    return f"{text}; sum of parts alone {serial:,.0f}, optimum {optimal:,.0f} tokens/s:"


def _rung_row(rung: Document) -> list[str]:
    repeats = rung["total_tokens_per_s_repeats"]
    wrong = [f"{rung[key]} {word}" for key, word in (("num_failed", "FAILED"), ("num_short", "SHORT")) if rung[key]]
    return [
        " ".join([ran(rung["rung"], rung["planned_part"]), *wrong]),
        f"{rung['total_tokens_per_s']:,.0f} ({min(repeats):,.0f} to {max(repeats):,.0f})",
        _number(rung["ratio_to_sequential"], ".3f"),
        _number(rung["predicted_ratio"], ".3f"),
        _number(rung["share_of_optimal"], ".1f", 100),
        _number(rung["share_of_serial"], ".1f", 100),
        _number(rung["energy_per_token_j"], ".1f", 1e3),
        _number(rung["power_w"], ".0f"),
        _number(rung["steady_tokens_per_s"], ",.0f"),
        _number(rung["steady_energy_per_token_j"], ".1f", 1e3),
        _number(rung["planned_part"], ".0%"),
        str(len(rung["plans"])),
    ]


def _predicted_rows(workload: Document) -> Iterator[list[str]]:
    for rung in workload["rungs"]:
        rate, predicted = rung["total_tokens_per_s"], rung["predicted_tokens_per_s"]
        ratio, predicted_ratio = rung["ratio_to_sequential"], rung["predicted_ratio"]
        if predicted is not None:
            is_compared = None not in (ratio, predicted_ratio)
            yield [
                workload["workload"],
                rung["rung"],
                f"{rate:,.0f}",
                f"{predicted:,.0f}",
                f"{predicted / rate - 1:+.1%}",
                _number(ratio, ".3f"),
                _number(predicted_ratio, ".3f"),
                f"{predicted_ratio - ratio:+.3f}" if is_compared else "",
                _number(rung["energy_per_token_j"], ".1f", 1e3),
                _number(rung["predicted_energy_per_token_j"], ".1f", 1e3),
            ]


def _known(revision: str) -> str:
    return revision_of(None if revision == "unknown" else revision)


def _number(value: float | None, digits: str, factor: float = 1.0) -> str:
    return "" if value is None else format(value * factor, digits)
