"""Overlap in short: a table a model, a row a workload, a column a mechanism, and where the engine's speed comes from.

Pure functions of records in which the rungs of a ladder ran the very same batches. What a whole run made stands in
`tables.py`; everything that is not shown here stays in the records, which the page links.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median

from records import (
    RESULTS,
    Document,
    ladders,
    peer_ratios,
    place_of,
    revision_of,
    searched_runs,
    spread_of,
)
from tables import table

_INTRO = """\
Gains in the middle of a run, where requests come as others leave: the time of the sequential plan divided by that of
the column, on the very same batches, one engine and one card; means of the repeats (least to most). All columns of a
row have the same limits, which are those that plans were searched for.

- *nano-batches* cuts every batch in two on one lane: what overlapping costs before it gains anything.
- *stream*, *partition*, *beside* and *inside* run the best plan of that mechanism for each kind of batch, even where it
  is predicted to lose. [The mechanisms](architecture.md#lanes).
- *searched* is what `nanoflow search` chose. Where it chose no plan, the sequential plan ran and the table says so.
- *predicted* is the profile's gain for *searched* on these batches; *energy* is that of *searched* as a part of the
  sequential plan's; *planned* is the part of its iterations that ran a plan.

How each number was measured stands in the records; what was learnt from it, in [findings.md](findings.md)."""

_MECHANISMS = ("nano-batches", "stream", "partition", "beside", "inside", "searched")


def summary_parts(results: Path) -> Iterator[str]:
    """A table of each model whose rungs ran the same batches; nothing without records."""
    found = list(ladders(results))
    if found:
        yield from ("## Overlap, by workload and mechanism", _INTRO)
    for path, document in found:
        options, packages = document["options"], document["software"]["packages"]
        revisions = sorted({revision_of(each["git_revision"]) for each in document["workloads"]})
        place, budget = place_of(document["machine"]), f"token budget {options['max_batch_tokens']:,}"
        yield f"### {_model(document)}, {budget}, on {place}"
        yield "\n".join(table(_HEADINGS, [_row(workload) for workload in document["workloads"]]))
        yield (
            f"{options['dtype'].capitalize()}, at most {options['max_num_seqs']:,} requests at once; torch "
            f"{packages['torch']}, CUDA {document['software']['cuda']}, triton {packages['triton']}; revisions "
            f"{', '.join(revisions)}; [JSON](../benchmarks/results/{path.as_posix()})."
        )
        weighed = [each["workload"] for each in document["workloads"] if not each["has_same_batches"]]
        if weighed:
            yield (
                "Measured before rungs had the same batches, so that gains are of batches that weigh the same, and "
                f"tokens/s of other mixes of prompts and decodes: {', '.join(weighed)}."
            )


_HEADINGS = ("workload", "sequential tokens/s", "of parts alone", *_MECHANISMS, "predicted", "energy", "planned")


def _row(workload: Document) -> list[str]:
    rungs = {rung["rung"]: rung for rung in workload["rungs"]}
    sequential, searched = rungs.get("sequential"), rungs.get("searched")
    return [
        workload["workload"],
        "" if sequential is None else f"{mean(sequential['tokens_per_s']):,.0f}",
        "" if sequential is None else _of_parts(mean(sequential["tokens_per_s"]), workload["serial_tokens_per_s"]),
        *(_gain(rungs.get(name)) for name in _MECHANISMS),
        "" if searched is None else f"{searched['predicted_gain']:.3f}",
        "" if searched is None or not searched["energy_ratios"] else f"{mean(searched['energy_ratios']):.3f}",
        "" if searched is None else f"{searched['planned_part']:.0%}",
    ]


def _gain(rung: Document | None) -> str:
    """The mean gain; of what was searched its spread too, and that it was the sequential plan."""
    if rung is None:
        return ""
    text = f"{mean(rung['gains']):.3f}"
    if rung["rung"] == "searched":
        text += f" {spread_of(rung['gains'])}"
    return text if rung["planned_part"] else f"{text}, sequential"


def _of_parts(rate: float, serial: float | None) -> str:
    """A rate as a part of the serial bound, which is none where it is passed."""
    if serial is None:
        return ""
    return f"{rate / serial:.1%}" + (" (no bound)" if rate > serial else "")


def _model(document: Document) -> str:
    return str(document["model"]).removeprefix("preset:")


def where_speed_comes_from(results: Path = RESULTS) -> str:
    """A list: what the sequential engine makes over a peer, and what overlap adds to that; empty without records."""
    lines = [*_over_peers(results), *_in_whole_runs(results), *_in_the_middle(results)]
    return "\n".join(lines)


def _over_peers(results: Path) -> Iterator[str]:
    by_model: dict[tuple[str, str], list[float]] = {}
    for model, peer, ratio in peer_ratios(results):
        by_model.setdefault((model, peer), []).append(ratio)
    for (model, peer), ratios in by_model.items():
        yield (
            f"- **The sequential engine**, without any overlap, makes {_range(ratios, '.2f')} times the tokens/s of "
            f"{peer} with {model}\n  ({_workloads(len(ratios))}, not measured in the same hour)."
        )


def _in_whole_runs(results: Path) -> Iterator[str]:
    ratios = [
        f"  {each['workload']} x {each['num_requests']:,}: {_range(each['ratios'], '.3f')}"
        for each in searched_runs(results)
    ]
    if ratios:
        yield (
            "- **Overlap** in whole runs with searched plans, tokens/s over those of the best sequential limits:\n"
            + ";\n".join(ratios)
            + "."
        )


def _in_the_middle(results: Path) -> Iterator[str]:
    for _, document in ladders(results):
        rungs = [
            (each["workload"], rung)
            for each in document["workloads"]
            for rung in each["rungs"]
            if rung["rung"] == "searched"
        ]
        gains = [mean(rung["gains"]) - 1 for _, rung in rungs]
        if not any(rung["planned_part"] for _, rung in rungs):
            yield (
                f"- With {_model(document)} overlap gains nothing on {_workloads(len(rungs))}, "
                "and the search answers with the sequential plan."
            )
        elif len(gains) == 1:
            yield f"- In the middle of a run of {rungs[0][0]} it gains {gains[0]:.1%} with {_model(document)}."
        else:
            yield (
                f"- In the middle of a run, where requests come as others leave, it gains {_range(gains, '.1%')} with "
                f"{_model(document)}\n  ({_workloads(len(gains))}, median {median(gains):.1%})."
            )


def _range(values: Sequence[float], digits: str) -> str:
    low, high = format(min(values), digits), format(max(values), digits)
    return low if low == high else f"{low} to {high}"


def _workloads(count: int) -> str:
    return "1 workload" if count == 1 else f"{count} workloads"
