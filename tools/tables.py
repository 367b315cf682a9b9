"""Records of runs in turn, of servers under load and of peers as parts of docs/benchmarks.md: a table each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median
from textwrap import fill
from typing import Any

from nanoflow.bench.provenance import portable
from records import (
    Document,
    beside,
    command_of,
    gap_of,
    in_ms,
    load_name,
    middle,
    named,
    peer_of,
    place_of,
    revision_of,
    sampling_of,
    served_peer,
    spread_of,
)

_PEERS = "../benchmarks/results/peers.json"


def settings_text(settings: Mapping[str, Any]) -> str:
    """The settings that a run is judged by."""
    given = set(settings.get("was_given", ()))
    limits = ", ".join(
        f"{settings[name]:,} {word}{'' if name in given else ' (chosen)'}"
        for name, word in (("max_batch_tokens", "tokens"), ("max_num_seqs", "requests"))
    )
    book = f", book {settings['book']} ({settings['num_plans']} plans)" if settings["num_plans"] else ", sequential"
    return f"{limits}, goal {settings['goal']}{book}"


def in_turn_parts(name: str, document: Document, peers: Document) -> Iterator[str]:
    """A record of settings in turn: where, by which command, and a table with the settings of every row."""
    yield f"**{name}**: {place_of(document['machine'])}; `{command_of(document)}`"
    headings = (
        *("workload", "requests", "repeats", "what ran", "settings", "total tokens/s", "over", "ratio (repeats)"),
        *(() if document["benchmark"] != "steady" else _STEADY_HEADINGS),
        *("mJ/token", "peer", "revision"),
    )
    by_name: dict[tuple[str, int | None, str], list[Document]] = {}
    for run in document["runs"]:
        asked = run["asked"]
        by_name.setdefault((asked["workload"], asked["num_requests"], asked["name"]), []).append(run)
    rows = []
    for each in document.get("results", ()):
        runs = by_name[each["workload"], each["num_requests"], each["name"]]
        run, asked = runs[0], runs[0]["asked"]
        entry = _offline_peer(peers, run)
        wrong = f", {each['num_failed']} FAILED" if each["num_failed"] else ""
        rates = each["repeats_tokens_per_s"]
        rows.append(
            [
                each["workload"],
                "without end" if each["num_requests"] is None else f"{each['num_requests']:,}",
                str(len(each["repeats_tokens_per_s"])),
                ran(each["name"], each["planned_part"] if each["num_plans"] else None) + wrong,
                settings_text(run["settings"]),
                f"{median(rates):,.0f} {spread_of(rates, ',.0f')}",
                each["base"],
                f"{each['ratio']:.3f} {spread_of(each['ratios'])}",
                *(() if document["benchmark"] != "steady" else _steady_cells(each, runs)),
                "" if each["energy_per_token_j"] is None else f"{each['energy_per_token_j'] * 1e3:.1f}",
                beside(entry, median(rates)),
                ", ".join(revision_of(revision) for revision in each["git_revisions"]),
            ]
        )
    yield "\n".join(table(headings, rows))


_STEADY_HEADINGS = (
    "same batches",
    "predicted",
    "planned",
    "tokens an iteration",
    "of prompts",
    "keys a decode",
    "turn",
)


def _steady_cells(result: Document, runs: Sequence[Document]) -> Iterator[str]:
    """What a steady state has beside what whole runs have."""
    means = {
        name: mean(run["metrics"][name] for run in runs)
        for name in ("iteration_tokens", "prompt_part", "decode_context")
    }
    gains, predicted = result["gains"], [run["metrics"]["predicted_gain"] for run in runs]
    yield f"{median(gains):.3f} {spread_of(gains)}" if gains else ""
    yield "" if None in predicted else f"{mean(predicted):.3f}"
    yield f"{result['planned_part'] or 0:.0%}"
    yield f"{means['iteration_tokens']:,.0f}"
    yield f"{means['prompt_part']:.0%}"
    yield f"{means['decode_context']:,.0f}"
    yield f"{runs[0]['metrics']['duration_s']:.1f} s, {runs[0]['settings']['num_pages']:,} KV pages"


def _offline_peer(peers: Document, run: Document) -> Document | None:
    """A peer that was given the same requests; requests without end are nobody else's."""
    asked = run["asked"]
    if asked["num_requests"] is None:
        return None
    same = {key: asked[key] for key in ("workload", "num_requests", "sampling", "text")}
    return peer_of(peers, "offline", **same, model=asked["engine"]["model"], dtype=run["settings"]["dtype"])


def ran(rung: str, planned_part: float | None) -> str:
    """What ran: a rung of which no iteration had a plan of its book was sequential, whatever it is named."""
    if rung.startswith("sequential") or planned_part is None or planned_part > 0:
        return rung
    return f"sequential ({rung}: no plan for these batches)"


def serving_parts(name: str, document: Document, peers: Document) -> Iterator[str]:
    """A record of a server under load."""
    server = document["server"]
    start = "" if server["start_s"] is None else f", ready after {server['start_s']:.1f} s"
    yield (
        f"**{name}**: {server['model']} on {place_of(document['machine'])}, revision "
        f"{revision_of(document['software']['git_revision'])}{start}; `{command_of(document)}`"
    )
    headings = (
        *("load", "sampling", "requests", "repeats", "total tokens/s", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms"),
        *("longest gap p50 / p99 ms", "failed", "server CPU us a token", "peer", "peer's TTFT, longest gap p99 ms"),
    )
    rows = []
    for load in document["loads"]:
        run, entry = middle(load), served_peer(peers, document, load)
        cpu_s, rates = run["server_cpu_s_per_output_token"], [each["total_tokens_per_s"] for each in load["repeats"]]
        rows.append(
            [
                f"{load['workload']['workload']} {load_name(load)}",
                named(sampling_of(load["workload"])),
                f"{load['workload']['num_requests']:,}",
                str(len(rates)),
                f"{median(rates):,.0f} {spread_of(rates, ',.0f')}",
                *(_both_ms(run[key]) for key in ("ttft_s", "tpot_s", "longest_gap_s")),
                str(sum(each["num_failed"] for each in load["repeats"])),
                "" if cpu_s is None else f"{cpu_s * 1e6:.1f}",
                beside(entry, median(rates)),
                "" if entry is None else f"{in_ms(entry['ttft_s']['p99'])}, {gap_of(entry)}",
            ]
        )
    yield "\n".join(table(headings, rows))
    for load_text, ratio in document.get("http_over_in_process", {}).items():
        yield f"{load_text}: HTTP over in-process {ratio:.3f}."


def _both_ms(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['p50'] * 1e3:,.1f} / {spread['p99'] * 1e3:,.1f}"


def startup_parts(name: str, document: Document, _peers: Document) -> Iterator[str]:
    """A server that is started in pairs; the second start of a pair finds its kernels compiled."""
    options = " ".join(document["options"])
    yield (
        f"**{name}**: {document['model'].removeprefix('preset:')} on {place_of(document['machine'])}, revision "
        f"{revision_of(document['software']['git_revision'])}"
        + (f", `{portable(options)}`" if options else "")
        + "; weights in the page cache; seconds."
    )
    starts = document["starts"]
    rows = [
        [name, str(len(each)), *(_median_of([start[part] for start in each]) for part in starts[0])]
        for name, each in (("nothing compiled", starts[::2]), ("kernels in the cache", starts[1::2]))
    ]
    yield "\n".join(table(("start", "repeats", *starts[0]), rows))


def _median_of(values: Sequence[float]) -> str:
    return f"{median(values):.1f}" + (f" {spread_of(values, '.1f')}" if len(values) > 1 else "")


def peer_parts(peers: Document) -> Iterator[str]:
    """Who the peer is, and how each kind of its runs was made; its rates stand beside ours and in its record."""
    yield fill(f"{peers['peer']} on {peers['hardware']}: {peers['build']}. All of its runs: [JSON]({_PEERS}).", 118)
    runs = [entry for entry in peers["runs"] if entry["mode"] != "start"]
    yield "\n".join(fill(f"- {how}.", 118, subsequent_indent="  ") for how in dict.fromkeys(map(_how, runs)))
    for entry in peers["runs"]:
        if entry["mode"] == "start":
            times = f"{entry['model'].removeprefix('preset:')}: {entry['cold_s']} s and {entry['cached_s']} s"
            yield fill(f"{times} ({_how(entry)}).", 118)


def _how(entry: Document) -> str:
    return f"{entry['options']}; {entry['source']}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown, line by line."""
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
