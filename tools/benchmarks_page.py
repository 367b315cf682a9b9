"""Write docs/benchmarks.md from the records under benchmarks/results: whole runs, runs in turn, and older ladders.

Run after adding a result: `python tools/benchmarks_page.py`. With `--check` it changes nothing and fails if the page is
out of date; a test does that. What has no record is not mentioned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from docs import ROOT, spread
from records import beside, peer_of, place_of, revision_of, sampling_of
from tables import in_turn_parts, peer_parts, ran, serving_parts, startup_parts
from tables import table as _table

PAGE = ROOT / "docs/benchmarks.md"
RESULTS = ROOT / "benchmarks/results"
PICTURES = {
    "sequential.svg": "The sequential plan, predicted and in a profiler's trace",
    "nano-batches.svg": "Nano-batches on one lane",
    "stream.svg": "Plain streams",
    "beside.svg": "Kernels beside each other on every multiprocessor",
    "partition.svg": "Disjoint multiprocessors",
    "inside.svg": "Decode attention inside products, predicted",
    "overlap.svg": "A searched plan for disjoint multiprocessors, predicted",
    "searched.svg": "A plan of the searched book",
}

Document = dict[str, Any]

_INTRO = """\
# Benchmarks

<!-- Written by tools/benchmarks_page.py from benchmarks/results; do not edit. -->

Every number here is read from a record under `benchmarks/results/` by `python tools/benchmarks_page.py`; `python -m
benchmarks.session` measures what is in turn or served, piece by piece. If nothing else is said, requests are there all
at once, prompts are random token ids, completions are greedy and of fixed length. Tokens/s are prompt and output
tokens, from the first request to the last token. Whole runs name their settings; a revision that is *dirty* had changes
that no commit has, one that is *not known* was measured from a copy of the sources.

The *sum of parts alone* (the serial bound) is what an engine without overlap would reach if every operation ran as it
does by itself, back to back: at the clock and power that each part has alone. An engine that mixes hungry operations
with others can pass it, because the card's power limit is then spent otherwise; where one does, the table says that it
is no bound. The *optimum* is the products alone, at their own clock. An energy whose mean power is above the card's
limit was an error of the counter and is left out."""

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


_STEADY = """\
A server with enough to do is always in the middle of its work: requests come as others leave. Here the first requests
are anywhere in their completions, new ones always wait, and the rungs take turns on one card (`python -m
benchmarks.steady`), each at its own limits, all with the same number of KV pages. A rung stands beside the fastest
sequential one. Where a sequential rung has the same limits, both have the very same batches, since what is scheduled
depends on lengths alone: *same batches* is its time / that of this rung, *predicted* what the profile says of them."""

_OLD_STEADY = """\
Measured in November 2026 with the same limits for all rungs, on one engine and with the very same batches. *Gain* is
the time of the sequential rung / that of this one, *energy* a part of the sequential rung's, *predicted* the profile's
gain on these very batches. Tokens/s are those that the model worked through, prompt and output tokens; numbers are
means of the repeats (least to most). The bounds are of the whole workload: where its batches swing, turns with more
prompts, or fewer, come nearer to them than others."""


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args, wanted = parser.parse_args(), page(RESULTS)
    if not args.check:
        PAGE.write_text(wanted)
    elif not PAGE.exists() or PAGE.read_text() != wanted:
        raise SystemExit("docs/benchmarks.md is out of date: run python tools/benchmarks_page.py")


def page(results: Path, pictures: Path | None = None) -> str:
    """The page, of the records in a folder and the pictures there are."""
    peers = _read(results / "peers.json") if (results / "peers.json").exists() else {}
    runs = [(path.name, _read(path)) for path in sorted(results.glob("throughput_*.json"))]
    parts = [_INTRO]
    if runs:
        parts += ["## Whole runs", "\n".join(run_lines(runs, peers))]
    for title, pattern, parts_of in _IN_TURN:
        found = [(path.name, _read(path)) for path in sorted(results.glob(pattern))]
        found = [(name, document) for name, document in found if not _is_old(document)]
        parts += title if found else []
        for name, document in found:
            parts += list(parts_of(name, document, peers))
    ladders = [(path, _read(path)) for path in sorted(results.rglob("ladder_*.json"))]
    if ladders:
        parts += ["## History: the ablation ladder", _LADDER]
    for path, ladder in ladders:
        parts += list(ladder_parts(path.relative_to(results), ladder))
    steady = [(path, old) for path in sorted(results.rglob("steady_*.json")) if _is_old(old := _read(path))]
    if steady:
        parts += ["## History: the steady state, rung by rung", _OLD_STEADY]
    for path, document in steady:
        parts += list(steady_parts(path.relative_to(results), document))
    if peers:
        parts += ["## Peers", *peer_parts(peers)]
    drawn = list(picture_parts(pictures or ROOT / "docs/pictures"))
    if drawn:
        parts += ["## Timelines", *drawn]
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def _is_old(document: Document) -> bool:
    """Whether rungs stand under workloads, all at the same limits; newer records have runs in turn."""
    return "workloads" in document


# Kinds of records that are shown alike: their heading, their files, and what makes parts of one.
_IN_TURN = (
    (["## Whole runs in turn: overlap against the best sequential setting"], "whole_runs_*.json", in_turn_parts),
    (["## The steady state: overlap against the best sequential setting", _STEADY], "steady_*.json", in_turn_parts),
    (["## Sampled"], "sampled_*.json", in_turn_parts),
    (["## Limits chosen and set by hand"], "limits_*.json", in_turn_parts),
    (["## Served over HTTP"], "serving_*.json", serving_parts),
    (["## Starts of a server"], "startup_*.json", startup_parts),
)


def run_lines(runs: Sequence[tuple[str, Document]], peers: Document) -> Iterator[str]:
    """The table of whole runs; a peer's rate stands beside ours where it ran the same requests."""
    yield "Median (least to most) of the repeats. A peer stands beside a run where model, requests and sampling match."
    yield ""
    yield from _table(_RUN_HEADINGS, [_run_row(name, run, peers) for name, run in runs])


def _run_row(name: str, run: Document, peers: Document) -> list[str]:
    rates, model, work = _values(run, "total_tokens_per_s"), run["model"], run["workload"]
    entry = peer_of(
        peers,
        "offline",
        model=model["name"],
        dtype=model["dtype"],
        workload=work["workload"],
        num_requests=work["num_requests"],
        sampling=sampling_of(work),
        text=work.get("text", False),
    )
    return [
        f"{model['name'].removeprefix('preset:')}, {model['dtype']}, {model['weights']} weights",
        work["workload"],
        f"{work['num_requests']:,}",
        str(len(run["repeats"])),
        run["plan"].split()[0],
        f"{model['max_batch_tokens']:,} / {model['max_num_seqs']:,}",
        spread(rates, ",.0f", ""),
        spread(_values(run, "energy_per_token_j", 1e3), ".1f", ""),
        _of_parts(_values(run, "share_of_serial", 100)),
        spread(_values(run, "share_of_optimal", 100), ".1f", ""),
        beside(entry, median(rates)),
        place_of(run["machine"]),
        revision_of(run["software"]["git_revision"]),
        f"[JSON](../benchmarks/results/{name})",
    ]


def _of_parts(percent: list[float]) -> str:
    """Parts of the sum of parts alone; it is no bound where one is above."""
    return spread(percent, ".1f", "") + (" (no bound)" if percent and max(percent) > 100 else "")


def _values(run: Document, name: str, factor: float = 1.0) -> list[float]:
    values = [repeat.get(name) for repeat in run["repeats"]]
    return [value * factor for value in values if value is not None]


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
_RUN_HEADINGS = (
    *("model", "workload", "requests", "repeats", "plan", "tokens / requests at once", "tokens/s", "mJ/token"),
    *("% of parts alone", "% of optimum", "beside a peer", "hardware", "revision", "record"),
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


def picture_parts(folder: Path) -> Iterator[str]:
    """The pictures that are there, as `nanoflow plan show --svg` draws them."""
    there = [(name, caption) for name, caption in PICTURES.items() if (folder / name).exists()]
    if there:
        yield (
            "Three layers each, lanes by time, as `nanoflow plan show PLAN --profile PROFILE --svg FILE` draws them:\n"
            "which operation runs on which nano-batch beside what, and the use of each resource below."
        )
    for name, caption in there:
        yield f"{caption}:"
        yield f"![{caption}](pictures/{name})"


def _known(revision: str) -> str:
    return revision_of(None if revision == "unknown" else revision)


def _number(value: float | None, digits: str, factor: float = 1.0) -> str:
    return "" if value is None else format(value * factor, digits)


if __name__ == "__main__":
    main()
