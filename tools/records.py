"""Records of runs in turn, of servers under load and of peers, as rows of tables: for docs/benchmarks.md and README.md.

Pure functions of documents; a peer stands beside a run only where model, workload, requests and sampling are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nanoflow.bench.config import SAMPLING, BenchConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
Document = dict[str, Any]
Row = tuple[str, str, str, str]

_COMMANDS = {
    "sampled_llama-3-8b": "python -m benchmarks.sampled --model preset:llama-3-8b "
    "--workloads trace:sharegpt.csv:1500 --json benchmarks/results/sampled_llama-3-8b.json",
    "serving_llama-3-8b": "python -m benchmarks.serving --model preset:llama-3-8b --workload trace:sharegpt.csv "
    "--temperature 0.7 --rates inf:1200 20:1200 35:1200 --repeats 3 --in-process "
    "--json benchmarks/results/serving_llama-3-8b.json",
    "serving_llama-3.2-1b": "python -m benchmarks.serving --model preset:llama-3.2-1b --workload trace:sharegpt.csv "
    "--temperature 0.7 --rates inf:3000 100:3000 --repeats 3 --in-process "
    "--json benchmarks/results/serving_llama-3.2-1b.json",
    "whole_runs_llama-3-8b": "python -m benchmarks.whole_runs --workloads 1024/512:1400 "
    "--rungs sequential=2048/1024 sequential=8192/2048 searched=BOOK.json "
    "--json benchmarks/results/whole_runs_llama-3-8b.json",
}


def read(path: Path) -> Document:
    """A document; empty if there is none."""
    document: Document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return document


def peer_of(peers: Document, mode: str, **wanted: Any) -> Document | None:
    """The newest run of a peer with these settings; those that its entry does not say are taken to be the same."""
    same = [
        entry
        for entry in peers.get("runs", ())
        if entry["mode"] == mode and all(entry.get(name) in (None, value) for name, value in wanted.items())
    ]
    return max(same, key=lambda entry: str(entry["date"]), default=None)


def beside(entry: Document | None, rate: float) -> str:
    """A rate as a multiple of a peer's."""
    if entry is None:
        return ""
    there = entry["total_tokens_per_s"]
    return f"{rate / there:.2f}x {entry['peer']} ({there:,}, {entry['date']})"


def place_of(machine: Document) -> str:
    """The GPU, or the processor of a machine that has none."""
    if not machine["gpus"]:
        return str(machine["cpu_name"])
    gpu = machine["gpus"][0]
    power = "" if gpu["power_limit_w"] is None else f", {gpu['power_limit_w']:.0f} W"
    return f"{gpu['name']}{power}, driver {gpu['driver_version']}"


def revision_of(revision: str | None) -> str:
    """A revision for people: short, and marked if nobody can have the sources."""
    if revision is None:
        return "not known"
    commit, _, rest = revision.partition("-")
    return f"{commit[:12]} (dirty)" if rest == "dirty" else revision[:12]


def sampling_of(workload: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens were chosen, from the options of a benchmark; older records have none and are greedy."""
    return BenchConfig(**{name: workload[name] for name in SAMPLING if name in workload}).sampling


def named(sampling: Mapping[str, Any]) -> str:
    """Sampling for people."""
    more = ", ".join(f"{name} {value:g}" for name, value in sampling.items() if (name, value) != ("temperature", 0.0))
    return more or "greedy"


def load_name(load: Document) -> str:
    """When requests arrived."""
    rate = load["load"]["request_rate"]
    return "at once" if rate is None else f"at {rate:g}/s"


def served_peer(peers: Document, document: Document, load: Document) -> Document | None:
    """A peer under the same load."""
    work, rate = load["workload"], load["load"]["request_rate"]
    same = [
        {**peers, "runs": [each for each in peers.get("runs", ()) if each.get("request_rate") == rate]},
        {"model": document["server"]["model"], "workload": work["workload"], "num_requests": work["num_requests"]},
    ]
    return peer_of(same[0], "served", **same[1], sampling=sampling_of(work))


def middle(load: Document) -> Document:
    """The repeat in the middle by its rate."""
    repeats: list[Document] = sorted(load["repeats"], key=lambda run: run["total_tokens_per_s"])
    return repeats[len(repeats) // 2]


def settings_text(settings: Mapping[str, Any]) -> str:
    """The settings that a run is judged by."""
    given = set(settings.get("was_given", ()))
    limits = ", ".join(
        f"{settings[name]:,} {word}{'' if name in given else ' (chosen)'}"
        for name, word in (("max_batch_tokens", "tokens"), ("max_num_seqs", "requests"))
    )
    book = f", book {settings['book']} ({settings['num_plans']} plans)" if settings["num_plans"] else ", sequential"
    return f"{limits}, goal {settings['goal']}{book}"


def readme_rows(results: Path = RESULTS) -> Iterator[Row]:
    """The five rows of README: what, measured, hardware, and the name of the record without its ending."""
    peers = read(results / "peers.json")
    yield _sampled_row(results, peers)
    for model in ("llama-3-8b", "llama-3.2-1b"):
        yield _served_row(results, peers, model)
    yield _overlap_row(results)
    yield _cpu_row(results)


def _not_measured(what: str, name: str) -> Row:
    return what, f"not measured yet: `{_COMMANDS[name]}`", "", ""


def _sampled_row(results: Path, peers: Document) -> Row:
    what, name = "Llama-3-8B, in process, temperature 0.8, top_p 0.95", "sampled_llama-3-8b"
    document = read(results / f"{name}.json")
    found = [each for each in document.get("results", ()) if each["name"] == "top_p"]
    if not found:
        return _not_measured(what, name)
    parts = []
    for each in found:
        entry = peer_of(
            peers,
            "offline",
            model="preset:llama-3-8b",
            dtype="bfloat16",
            workload=each["workload"],
            num_requests=each["num_requests"],
            sampling={"temperature": 0.8, "top_p": 0.95},
        )
        text = f"{each['workload']}: {each['total_tokens_per_s']:,.0f} total tokens/s, {each['ratio']:.3f} of greedy"
        parts.append(", ".join(filter(None, (text, beside(entry, each["total_tokens_per_s"])))))
    return what, "; ".join(parts), place_of(document["machine"]), name


def _served_row(results: Path, peers: Document, model: str) -> Row:
    name = f"serving_{model}"
    what = f"{model.capitalize()}, served over HTTP, sharegpt lengths, temperature 0.7"
    document = read(results / f"{name}.json")
    if not document.get("loads"):
        return _not_measured(what, name)
    parts = []
    for load in document["loads"]:
        run, entry = middle(load), served_peer(peers, document, load)
        if load["load"]["request_rate"] is None:
            text = f"{load_name(load)} {run['total_tokens_per_s']:,.0f} total tokens/s"
            parts.append(", ".join(filter(None, (text, beside(entry, run["total_tokens_per_s"])))))
        elif run["ttft_s"] is not None and run["longest_gap_s"] is not None:
            figures = f"{run['ttft_s']['p99'] * 1e3:,.0f}, {run['longest_gap_s']['p99'] * 1e3:,.0f}"
            there = "" if entry is None else f" ({entry['peer']}: {_ms(entry['ttft_s']['p99'])}, {_gap(entry)})"
            parts.append(f"{load_name(load)} TTFT, longest gap p99 {figures} ms{there}")
    parts += [f"{ratio:.2f} of in process" for ratio in document.get("http_over_in_process", {}).values()]
    return what, "; ".join(parts), place_of(document["machine"]), name


def _ms(time_s: float) -> str:
    return f"{time_s * 1e3:,.0f}"


def _gap(entry: Document) -> str:
    return _ms(entry["longest_gap_p99_s"])


def _overlap_row(results: Path) -> Row:
    what, name = "Llama-3-8B, whole runs, searched plans over the best sequential setting", "whole_runs_llama-3-8b"
    document = read(results / f"{name}.json")
    found = [each for each in document.get("results", ()) if each["name"] == "searched" and each["planned_part"]]
    if not found:
        return _not_measured(what, name)
    parts = [f"{each['workload']} {each['ratio']:.3f} {_spread(each['ratios'])}" for each in found]
    return what, "; ".join(parts), place_of(document["machine"]), name


def _cpu_row(results: Path) -> Row:
    document = read(results / "cpu_decode_bfloat16.json")
    head = document.get("headline")
    if head is None:
        return "CPU decode", "not measured yet: `python benchmarks/cpu_decode.py`", "", ""
    return head["what"], head["measured"], head["hardware"], "cpu_decode_bfloat16"


def _spread(values: Sequence[float], digits: str = ".3f") -> str:
    return f"({min(values):{digits}} to {max(values):{digits}})" if values else ""


def in_turn_parts(name: str, document: Document, peers: Document) -> Iterator[str]:
    """A record of settings in turn: where, by which command, and a table with the settings of every row."""
    yield f"**{name}**: {place_of(document['machine'])}; `{document['command']}`"
    headings = (
        *("workload", "requests", "what ran", "settings", "total tokens/s", "over", "ratio (repeats)"),
        *("mJ/token", "peer", "revision"),
    )
    runs: dict[tuple[str, int, str], Document] = {}
    for run in document["runs"]:
        asked = run["asked"]
        runs.setdefault((asked["workload"], asked["num_requests"], asked["name"]), run)
    rows = []
    for each in document.get("results", ()):
        run = runs[each["workload"], each["num_requests"], each["name"]]
        asked = run["asked"]
        entry = peer_of(
            peers,
            "offline",
            **{key: asked[key] for key in ("workload", "num_requests", "sampling", "text")},
            model=asked["engine"]["model"],
            dtype=run["settings"]["dtype"],
        )
        wrong = f", {each['num_failed']} FAILED" if each["num_failed"] else ""
        rates = each["repeats_tokens_per_s"]
        rows.append(
            [
                each["workload"],
                f"{each['num_requests']:,}",
                ran(each["name"], each["planned_part"] if each["num_plans"] else None) + wrong,
                settings_text(run["settings"]),
                f"{median(rates):,.0f} {_spread(rates, ',.0f')}",
                each["base"],
                f"{each['ratio']:.3f} {_spread(each['ratios'])}",
                "" if each["energy_per_token_j"] is None else f"{each['energy_per_token_j'] * 1e3:.1f}",
                beside(entry, median(rates)),
                ", ".join(revision_of(revision) for revision in each["git_revisions"]),
            ]
        )
    yield "\n".join(table(headings, rows))


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
        f"{revision_of(document['software']['git_revision'])}{start}; `{document['command']}`"
    )
    headings = (
        *("load", "sampling", "requests", "total tokens/s", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms"),
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
                f"{median(rates):,.0f} {_spread(rates, ',.0f')}",
                *(_both_ms(run[key]) for key in ("ttft_s", "tpot_s", "longest_gap_s")),
                str(sum(each["num_failed"] for each in load["repeats"])),
                "" if cpu_s is None else f"{cpu_s * 1e6:.1f}",
                beside(entry, median(rates)),
                "" if entry is None else f"{_ms(entry['ttft_s']['p99'])}, {_gap(entry)}",
            ]
        )
    yield "\n".join(table(headings, rows))
    for load_text, ratio in document.get("http_over_in_process", {}).items():
        yield f"{load_text}: HTTP over in-process {ratio:.3f}."


def _both_ms(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['p50'] * 1e3:,.1f} / {spread['p99'] * 1e3:,.1f}"


def peer_parts(peers: Document) -> Iterator[str]:
    """All that is known of peers."""
    yield f"{peers['peer']} on {peers['hardware']}: {peers['build']}."
    headings = (
        *("date", "model", "workload", "requests", "sampling", "arrivals", "total tokens/s", "mJ/token"),
        *("TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "longest gap p99 ms", "how"),
    )
    runs = [entry for entry in peers["runs"] if entry["mode"] != "start"]
    hows = list(dict.fromkeys(map(_how, runs)))
    rows = [
        [
            entry["date"],
            f"{entry['model'].removeprefix('preset:')}, {entry['dtype']}",
            entry["workload"],
            "" if entry["num_requests"] is None else f"{entry['num_requests']:,}",
            named(entry["sampling"]),
            "at once" if entry["request_rate"] is None else f"{entry['request_rate']:g}/s",
            f"{entry['total_tokens_per_s']:,}",
            "" if entry["energy_per_token_j"] is None else f"{entry['energy_per_token_j'] * 1e3:.1f}",
            *(_both_ms(entry.get(key)) for key in ("ttft_s", "tpot_s")),
            _gap(entry) if "longest_gap_p99_s" in entry else "",
            f"({hows.index(_how(entry)) + 1})",
        ]
        for entry in runs
    ]
    yield "\n".join(table(headings, rows))
    yield "\n".join(f"({place}) {how}.  " for place, how in enumerate(hows, 1))
    for entry in peers["runs"]:
        if entry["mode"] == "start":
            yield (
                f"{entry['model'].removeprefix('preset:')}: {entry['cold_s']} s and {entry['cached_s']} s "
                f"({entry['options']}; {entry['source']})."
            )


def _how(entry: Document) -> str:
    return f"{entry['options']}; {entry['source']}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown, line by line."""
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
