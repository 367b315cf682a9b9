"""Records and peers read, and the five rows of README.md; `tables.py` and `summary.py` make docs/benchmarks.md.

Pure functions of documents; a peer stands beside a run only where model, workload, requests and sampling are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nanoflow.bench.options import SAMPLING, BenchConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
Document = dict[str, Any]
Row = tuple[str, str, str, str]

# What measures them: pieces of a session.
_PIECES = {
    "serving_llama-3-8b": "serving-llama-3-8b",
    "serving_llama-3.2-1b": "serving-llama-3.2-1b",
    "whole_runs_llama-3-8b": "search whole-runs",
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


# Modules of benchmarks that had another name when records were made.
_RENAMED = {
    "benchmarks.iteration": "benchmarks.engine.iteration",
    "benchmarks.limits": "benchmarks.engine.limits",
    "benchmarks.sampled": "benchmarks.engine.sampled",
    "benchmarks.serving": "benchmarks.engine.serving",
    "benchmarks.speculative": "benchmarks.engine.speculative",
    "benchmarks.startup": "benchmarks.engine.startup",
    "benchmarks.steady": "benchmarks.ladder.steady",
    "benchmarks.whole_runs": "benchmarks.ladder.whole_runs",
}


def command_of(document: Document) -> str:
    """The command that made a record, as it is typed today."""
    words = str(document["command"]).split(" ")
    return " ".join(_RENAMED.get(word, word) for word in words)


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


def readme_rows(results: Path = RESULTS) -> Iterator[Row]:
    """The five rows of README: what, measured, hardware, and names of records without their ending, with spaces."""
    peers = read(results / "peers.json")
    yield _sequential_row(results)
    for model in ("llama-3-8b", "llama-3.2-1b"):
        yield _served_row(results, peers, model)
    yield _overlap_row(results)
    yield _cpu_row(results)


def _not_measured(what: str, name: str) -> Row:
    return what, f"not measured yet: `python -m benchmarks.session --only {_PIECES[name]}`", "", ""


def _sequential_row(results: Path) -> Row:
    """The workloads that stand least and most above a peer; all of them are on the page."""
    what, name = "Llama-3-8B, without any overlap, greedy, without HTTP", "throughput_llama-3-8b"
    documents = _all(results, name)
    peers = {stem: runs_peer(results, document) for stem, document in documents.items()}
    ratios = {stem: _rate(documents[stem]) / peer["total_tokens_per_s"] for stem, peer in peers.items() if peer}
    shown = {stem: documents[stem] for stem in dict.fromkeys(_ends(ratios) or documents)}
    parts = []
    for stem, document in shown.items():
        work = document["workload"]
        size = f"{work['num_requests']:,} requests, {repeats_text(len(document['repeats']))}"
        text = f"{work['workload'].removeprefix('trace:').removesuffix('.csv')}: {_rate(document):,.0f} tokens/s"
        parts.append(", ".join(filter(None, (f"{text} ({size})", beside(peers[stem], _rate(document))))))
    if not parts:
        return what, "not measured yet: `nanoflow bench throughput --model preset:llama-3-8b`", "", ""
    more = f"of {len(ratios)} workloads the least and the most over a peer: " if len(ratios) > len(shown) else ""
    return what, more + "; ".join(parts), _places(shown), _names(shown)


def _ends(values: Mapping[str, float]) -> list[str]:
    """The names of the least and the largest value; nothing without values."""
    names = sorted(values, key=lambda name: values[name])
    return [names[0], names[-1]] if names else []


def _rate(document: Document) -> float:
    rates: list[float] = [repeat["total_tokens_per_s"] for repeat in document["repeats"]]
    return median(rates)


def runs_peer(results: Path, document: Document) -> Document | None:
    """A peer that was given the very requests of a whole run."""
    model, work = document["model"], document["workload"]
    return peer_of(
        read(results / "peers.json"),
        "offline",
        model=model["name"],
        dtype=_types_of(document),
        workload=work["workload"],
        num_requests=work["num_requests"],
        sampling=sampling_of(work),
        text=work.get("text", False),
    )


def _types_of(document: Document) -> str:
    """Types of weights and of the KV cache, as entries of peers name them."""
    config = document.get("config", {})
    form, cache = config.get("quantization"), config.get("kv_cache_dtype", "auto")
    weights = str(document["model"]["dtype"]) if form in (None, "none", "auto") else f"{form} weights (online)"
    return weights if cache == "auto" else f"{weights}, {cache} cache"


def peer_ratios(results: Path) -> Iterator[tuple[str, str, float]]:
    """Model, peer and the ratio of rates of each whole sequential run that a peer stands beside."""
    for path in sorted(results.glob("throughput_*.json")):
        document = read(path)
        entry = runs_peer(results, document)
        if entry is not None and document["plan"].split()[0] == "sequential":
            name = document["model"]["name"].removeprefix("preset:")
            yield name, entry["peer"], _rate(document) / entry["total_tokens_per_s"]


def searched_runs(results: Path) -> Iterator[Document]:
    """Results of whole runs under searched plans, of which some iteration had one."""
    for path in sorted(results.glob("whole_runs_*.json")):
        for each in read(path).get("results", ()):
            if each["name"] == "searched" and each["planned_part"]:
                yield each


def ladders(results: Path) -> Iterator[tuple[Path, Document]]:
    """Records whose rungs stand under workloads, with their places in the folder; newer ones have runs in turn."""
    for path in sorted(results.rglob("steady_*.json")):
        document = read(path)
        if is_ladder(document):
            yield path.relative_to(results), document


def is_ladder(document: Document) -> bool:
    """Whether rungs stand under workloads, all at the same limits; newer records have runs in turn."""
    return "workloads" in document


def _served_row(results: Path, peers: Document, model: str) -> Row:
    name = f"serving_{model}"
    what = f"{model.capitalize()}, served over HTTP, sharegpt lengths, temperature 0.7; 99th percentiles"
    documents = {stem: each for stem, each in _all(results, name).items() if each.get("loads")}
    if not documents:
        return _not_measured(what, name)
    parts = []
    for document in documents.values():
        parts += [text for load in document["loads"] if (text := _load_text(document, load, peers))]
        ratios = document.get("http_over_in_process", {}).values()
        parts += [f"that is {ratio:.2f} of the rate without HTTP" for ratio in ratios]
    return what, "; ".join(parts), _places(documents), _names(documents)


def _load_text(document: Document, load: Document, peers: Document) -> str:
    """What README says of a load; nothing of one without times of first tokens."""
    run, entry = middle(load), served_peer(peers, document, load)
    size = f"{load['workload']['num_requests']:,} requests, {repeats_text(len(load['repeats']))}"
    if load["load"]["request_rate"] is None:
        text = f"all {load_name(load)}: {run['total_tokens_per_s']:,.0f} tokens/s ({size})"
        return ", ".join(filter(None, (text, beside(entry, run["total_tokens_per_s"]))))
    if run["ttft_s"] is None or run["longest_gap_s"] is None:
        return ""
    first, gap = in_ms(run["ttft_s"]["p99"]), in_ms(run["longest_gap_s"]["p99"])
    there = "" if entry is None else f"; {entry['peer']}: {in_ms(entry['ttft_s']['p99'])} and {gap_of(entry)} ms"
    return f"{load_name(load)}: first token {first} ms, longest gap {gap} ms ({size}{there})"


def _all(results: Path, name: str) -> dict[str, Document]:
    """Records that are called so, or so with more after an underscore, by their names without the ending."""
    paths = [results / f"{name}.json", *sorted(results.glob(f"{name}_*.json"))]
    return {path.stem: read(path) for path in paths if path.exists()}


def _places(documents: Mapping[str, Document]) -> str:
    return "; ".join(dict.fromkeys(place_of(document["machine"]) for document in documents.values()))


def _names(documents: Mapping[str, Document]) -> str:
    return " ".join(documents)


def repeats_text(count: int) -> str:
    """How often something was measured."""
    return "1 repeat" if count == 1 else f"{count} repeats"


def _size(result: Document) -> str:
    """Requests and repeats of a result of runs in turn."""
    return f"{result['num_requests']:,} requests, {repeats_text(len(result['repeats_tokens_per_s']))}"


def in_ms(time_s: float) -> str:
    """Milliseconds for people."""
    return f"{time_s * 1e3:,.0f}"


def gap_of(entry: Document) -> str:
    """The longest gap of a peer, in milliseconds."""
    return in_ms(entry["longest_gap_p99_s"])


def _overlap_row(results: Path) -> Row:
    what, name = "Llama-3-8B, overlap: whole runs with searched plans over the best without", "whole_runs_llama-3-8b"
    documents = {}
    parts = []
    for stem, document in _all(results, name).items():
        for each in document.get("results", ()):
            if each["name"] == "searched" and each["planned_part"]:
                spread = spread_of(each["ratios"])
                parts.append(f"{each['workload']}: {each['ratio']:.3f} times the tokens/s {spread} ({_size(each)})")
                documents[stem] = document
    if not parts:
        return _not_measured(what, name)
    return what, "; ".join(parts), _places(documents), _names(documents)


def _cpu_row(results: Path) -> Row:
    document = read(results / "cpu_decode_bfloat16.json")
    head = document.get("headline")
    if head is None:
        return "CPU decode", "not measured yet: `python -m benchmarks.engine.cpu_decode`", "", ""
    return head["what"], head["measured"], head["hardware"], "cpu_decode_bfloat16"


def spread_of(values: Sequence[float], digits: str = ".3f") -> str:
    """Least and most; nothing without values."""
    return f"({min(values):{digits}} to {max(values):{digits}})" if values else ""
