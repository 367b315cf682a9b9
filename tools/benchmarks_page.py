"""Write docs/benchmarks.md from the records under benchmarks/results: a short summary; the rest stays in the records.

Run after adding a result: `python tools/benchmarks_page.py`. With `--check` it changes nothing and fails if the page is
out of date; a test does that. What has no record is not mentioned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from docs import ROOT, spread
from records import beside, is_ladder, place_of, revision_of, runs_peer
from summary import summary_parts, where_speed_comes_from
from tables import in_turn_parts, peer_parts, serving_parts, startup_parts
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

Every number here is read from a record under `benchmarks/results/`, and every table links its record, which has every
repeat, the command, the settings, the software and the machine. Older records are kept in that folder too. How the
numbers came about is in the [log](log/index.md), what was learnt in [findings.md](findings.md).

- If nothing else is said, all requests are there at once, prompts are random token ids, completions are greedy and of
  fixed length, and weights are random. Tokens/s are prompt and output tokens, from the first request to the last token.
- *Parts alone*, the serial bound, is what an engine without overlap would reach if every operation ran as it does by
  itself, back to back, at the clock and power that it has alone. An engine that mixes operations can pass it, because
  the card's power limit is then spent otherwise; the table says "no bound" there. The *optimum* is the matrix products
  alone, at their own clock.
- A revision that is *dirty* had changes that no commit has; one that is *not known* was measured from a copy of the
  sources. An energy whose mean power is above the card's limit was an error of the counter and is left out."""

_STEADY = """\
A busy server is always in the middle of its work: requests come as others leave. Here the first requests begin
anywhere in their completions, and new ones always wait. Settings take turns on one card (`python -m
benchmarks.ladder.steady`), each at its own limits, all with the same number of KV pages. Each is compared with the
fastest sequential setting. A sequential setting with the same limits has the very same batches, since scheduling
depends on lengths alone. *Same batches* is the time of that one / the time of this one; *predicted* is what the
profile expects."""


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
    sources = where_speed_comes_from(results)
    if sources:
        parts += ["## Where the speed comes from", sources]
    parts += summary_parts(results)
    if runs:
        parts += ["## Whole runs of the sequential engine", "\n".join(run_lines(results, runs))]
    for title, pattern, parts_of in _IN_TURN:
        found = [(path.name, _read(path)) for path in sorted(results.glob(pattern))]
        found = [(name, document) for name, document in found if not is_ladder(document)]
        parts += title if found else []
        for name, document in found:
            parts += list(parts_of(name, document, peers))
    if peers:
        parts += ["## Peers", *peer_parts(peers)]
    drawn = list(picture_parts(pictures or ROOT / "docs/pictures"))
    if drawn:
        parts += ["## Timelines", *drawn]
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


# Kinds of records that are shown alike: their heading, their files, and what makes parts of one.
_IN_TURN = (
    (["## Whole runs in turn: overlap against the best sequential setting"], "whole_runs_*.json", in_turn_parts),
    (["## The steady state: overlap against the best sequential setting", _STEADY], "steady_*.json", in_turn_parts),
    (["## Sampled"], "sampled_*.json", in_turn_parts),
    (["## Limits chosen and set by hand"], "limits_*.json", in_turn_parts),
    (["## Served over HTTP"], "serving_*.json", serving_parts),
    (["## Starts of a server"], "startup_*.json", startup_parts),
)


def run_lines(results: Path, runs: Sequence[tuple[str, Document]]) -> Iterator[str]:
    """The table of whole runs; a peer's rate stands beside ours where it ran the same requests."""
    yield "Median (least to most) of the repeats. A peer stands beside a run where model, requests and sampling match."
    yield ""
    yield from _table(_RUN_HEADINGS, [_run_row(name, run, runs_peer(results, run)) for name, run in runs])


def _run_row(name: str, run: Document, peer: Document | None) -> list[str]:
    rates, model, work = _values(run, "total_tokens_per_s"), run["model"], run["workload"]
    return [
        f"{model['name'].removeprefix('preset:')}, {_types(model)}, {model['weights']} weights",
        work["workload"],
        f"{work['num_requests']:,}",
        str(len(run["repeats"])),
        run["plan"].split()[0],
        f"{model['max_batch_tokens']:,} / {model['max_num_seqs']:,}",
        spread(rates, ",.0f", ""),
        spread(_values(run, "energy_per_token_j", 1e3), ".1f", ""),
        _of_parts(_values(run, "share_of_serial", 100)),
        spread(_values(run, "share_of_optimal", 100), ".1f", ""),
        beside(peer, median(rates)),
        place_of(run["machine"]),
        revision_of(run["software"]["git_revision"]),
        f"[JSON](../benchmarks/results/{name})",
    ]


def _types(model: Document) -> str:
    """The type that a model computes in, and those of weights and KV cache where they are others."""
    form, cache = model["model_type"].split()[-1], model.get("kv_cache_dtype", "auto")
    weights = f", weights in {form}" if form in ("FP8", "MXFP4") else ""
    return f"{model['dtype']}{weights}" + ("" if cache == "auto" else f", KV cache in {cache}")


def _of_parts(percent: list[float]) -> str:
    """Parts of the sum of parts alone; it is no bound where one is above."""
    return spread(percent, ".1f", "") + (" (no bound)" if percent and max(percent) > 100 else "")


def _values(run: Document, name: str, factor: float = 1.0) -> list[float]:
    values = [repeat.get(name) for repeat in run["repeats"]]
    return [value * factor for value in values if value is not None]


_RUN_HEADINGS = (
    *("model", "workload", "requests", "repeats", "plan", "tokens / requests at once", "tokens/s", "mJ/token"),
    *("% of parts alone", "% of optimum", "beside a peer", "hardware", "revision", "record"),
)


def picture_parts(folder: Path) -> Iterator[str]:
    """The pictures that are there, as `nanoflow plan show --svg` draws them."""
    there = [(name, caption) for name, caption in PICTURES.items() if (folder / name).exists()]
    if there:
        yield (
            "Three layers each, one row a lane, time to the right. `nanoflow plan show PLAN --profile PROFILE --svg\n"
            "FILE` draws them. Each bar is an operation on a nano-batch; below is the use of each resource."
        )
    for name, caption in there:
        yield f"{caption}:"
        yield f"![{caption}](pictures/{name})"


if __name__ == "__main__":
    main()
