"""Fill in the generated parts of README.md: the file tree (from module docstrings) and the results (from JSON).

Run after adding a file or a result: `python tools/docs.py`. With `--check` it changes nothing and fails if the README
is out of date; a test does that.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def summary(path: Path) -> str:
    """First sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) ", first)[0].rstrip(".")


def tree_lines(folder: Path) -> Iterator[str]:
    """One line a package and a file, the package's own files first."""
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield f"{path.name:<22} {summary(path)}"
    for package in sorted(p for p in folder.iterdir() if (p / "__init__.py").exists()):
        yield f"{package.name + '/':<22} {summary(package / '__init__.py')}"
        for path in sorted(package.glob("*.py")):
            if path.name != "__init__.py":
                yield f"  {path.name:<20} {summary(path)}"
    yield f"{'default_model/':<22} The embedded model: weights, tokenizer and its model card"


def file_tree() -> str:
    """The tree of the package as a code block."""
    return "\n".join(["```", "src/nanoflow/", *(f"  {line}" for line in tree_lines(ROOT / "src/nanoflow")), "```"])


def spread(
    values: list[float], digits: str, unit: str, middle: Callable[[list[float]], float] = statistics.median
) -> str:
    """Middle (minimum to maximum) of the repeats; nothing without values, no range if it shows none."""
    if not values:
        return ""
    low, central, high = (format(value, digits) for value in (min(values), middle(values), max(values)))
    return f"{central}{f' ({low} to {high})' if low != high else ''}{unit}"


def headline(document: dict[str, Any]) -> dict[str, str] | None:
    """What a record says in one row: its own headline, or that of a throughput run; None for a table of its own."""
    if document.get("benchmark") != "throughput":
        return document.get("headline")
    model, workload, gpu = document["model"], document["workload"], document["machine"]["gpus"][0]
    runs = document["repeats"]
    measured = [
        spread([run["total_tokens_per_s"] for run in runs], ",.0f", " total tokens/s"),
        spread([run["energy_per_token_j"] * 1e3 for run in runs if run["energy_per_token_j"]], ".1f", " mJ/token"),
        spread(
            [run["share_of_serial"] * 100 for run in runs if run.get("share_of_serial")], ".1f", " % of serial bound"
        ),
    ]
    return {
        "what": f"{model['name'].removeprefix('preset:')}, {model['dtype']}, {model['weights']} weights, "
        f"{workload['workload']}, {workload['num_requests']:,} requests, whole run, plan {model['plan'].split()[0]}",
        "measured": ", ".join(filter(None, measured)),
        "target": comparison(model["name"], workload, [run["total_tokens_per_s"] for run in runs]),
        "hardware": f"one {gpu['name']}, {gpu['power_limit_w']:.0f} W",
    }


def comparison(model: str, workload: dict[str, Any], rates: list[float]) -> str:
    """What a peer reaches on the same model and requests, how much of that we aim at and have; nothing without one."""
    peers = json.loads((ROOT / "benchmarks/results/peers.json").read_text())
    for entry in peers["throughput"]:
        if all(entry[key] == value for key, value in {"model": model, **identity(workload)}.items()):
            ratio = statistics.median(rates) / entry["total_tokens_per_s"]
            rate = f"{peers['peer']}: {entry['total_tokens_per_s']:,}"
            return f"{entry['aimed_ratio']:.2f}x of {rate}; reached {ratio:.2f}x"
    return ""


def identity(workload: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs of a workload comparable."""
    return {key: workload[key] for key in ("workload", "num_requests")}


def steady_headlines(document: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A row a workload: what the search chose is worth in the steady state."""
    gpu, budget = document["machine"]["gpus"][0], document["options"]["max_batch_tokens"]
    for workload in document["workloads"]:
        rungs = {rung["rung"]: rung for rung in workload["rungs"]}
        if "searched" not in rungs:
            continue
        gain = spread(rungs["searched"]["gains"], ".3f", " times sequential", statistics.fmean)
        energies = rungs["searched"]["energy_ratios"]
        yield {
            "what": f"{document['model'].removeprefix('preset:')}, {document['options']['dtype']}, random weights, "
            f"{workload['workload']}, token budget {budget:,}, steady state, searched plans",
            "measured": gain if energies is None else f"{gain}, {statistics.fmean(energies):.2f} of its energy",
            "target": "",
            "hardware": f"one {gpu['name']}, {gpu['power_limit_w']:.0f} W",
        }


def result_rows() -> Iterator[str]:
    """One row a record under benchmarks/results that has a headline, and one a workload of its ladders."""
    folder = ROOT / "benchmarks/results"
    found = [(path, headline(json.loads(path.read_text()))) for path in sorted(folder.glob("*.json"))]
    for path in sorted(folder.rglob("steady_*.json")):
        found += [(path, row) for row in steady_headlines(json.loads(path.read_text()))]
    for path, row in found:
        if row is not None:
            cells = (row["what"], row["measured"], row["target"], row["hardware"])
            yield "| " + " | ".join([*cells, f"[JSON]({path.relative_to(ROOT).as_posix()})"]) + " |"


def results_table() -> str:
    """The results table."""
    return "\n".join(["| benchmark | measured | target | hardware | record |", "|---|---|---|---|---|", *result_rows()])


def filled(text: str) -> str:
    """The README with its generated parts made anew."""
    for name, content in (("tree", file_tree()), ("results", results_table())):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise SystemExit(f"README.md has no part marked {name!r}")
        text = f"{text[: found.end(1)]}{content}\n{text[found.start(2) :]}"
    return text


def main() -> None:
    """Fill in or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    path, args = ROOT / "README.md", parser.parse_args()
    wanted = filled(path.read_text())
    if args.check and path.read_text() != wanted:
        raise SystemExit("README.md is out of date: run python tools/docs.py")
    if not args.check:
        path.write_text(wanted)


if __name__ == "__main__":
    main()
