"""Records of conversations of several rounds as a part of docs/rounds.md: a table each, with its picture.

`rounds_picture.py` draws the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

from records import Document, command_of, place_of, revision_of
from tables import table

ROOT = Path(__file__).resolve().parent.parent
_HEADINGS = (
    *("engine", "options", "KV pages", "prompt tokens computed", "hit rate", "computed, ratio", "TTFT p50 / p99 ms"),
    *("TTFT p50, ratio", "total tokens/s", "ratio", "same completions", "failed"),
)
_NOTHING = """\
Not measured on a GPU yet: `python -m benchmarks.engine.rounds --model preset:llama-3-8b --num-conversations 400`."""


def rounds_results(results: Path = ROOT / "benchmarks/results", pictures: Path = ROOT / "docs/pictures") -> str:
    """The part of the page: all records of `benchmarks.engine.rounds` in a folder, or the command that makes one."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(results.glob("rounds_*.json"))]
    parts = [
        part
        for path, document in found
        if document["benchmark"] == "rounds_in_turn"
        for part in _parts(path, document, pictures / f"{path.stem}.svg")
    ]
    return "\n\n".join(parts or [_NOTHING])


def _parts(path: Path, document: Document, picture: Path) -> Iterator[str]:
    work, talk, first = document["workload"], document["conversations"], document["runs"][0]
    yield fill(
        f"**{first['model']['name'].removeprefix('preset:')}**, {talk['num_conversations']:,} conversations of "
        f"{talk['rounds']} rounds, {work['workload']}; the device has {document['kv_fraction']:.0%} of their KV pages. "
        f"{place_of(document['machine'])}, revision {revision_of(document['software']['git_revision'])}; "
        f"[JSON](../benchmarks/results/{path.name}); `{command_of(document)}`.",
        118,
        break_long_words=False,
        break_on_hyphens=False,
    )
    yield "\n".join(table(_HEADINGS, [_row(document, each) for each in document["results"]]))
    if picture.exists():
        yield f"![Time to the first token and prompt tokens computed, by round](pictures/{picture.name})"


def _row(document: Document, result: Document) -> list[str]:
    (options,) = {each["options"] for each in document["variants"] if each["name"] == result["name"]}
    run = next(run for run in document["runs"] if run["variant"] == result["name"])
    return [
        result["name"],
        f"`{options}`" if options else "",
        f"{run['settings']['num_pages']:,}",
        _shown("1 of {:.2f}", result["asked_over_computed"]),
        _shown("{:.1%}", result["hit_rate"]),
        _shown("{:.3f}", result["computed_ratio"]),
        " / ".join(_shown("{:,.1f}", result[key] and result[key] * 1e3) for key in ("ttft_p50_s", "ttft_p99_s")),
        _shown("{:.3f}", result["ttft_p50_ratio"]),
        _shown("{:,.0f}", result["total_tokens_per_s"]),
        _shown("{:.3f}", result["total_tokens_per_s_ratio"]),
        f"{_shown('{}', result['num_same_completions'])} of {result['num_conversations']}",
        str(result["num_failed"]),
    ]


def _shown(form: str, value: float | None) -> str:
    return "unknown" if value is None else form.format(value)
