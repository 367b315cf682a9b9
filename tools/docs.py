"""Fill in the generated parts of README.md and of pages in docs/.

README.md has results (from JSON), docs/architecture.md the file tree (from module docstrings), docs/log/index.md a line
for each entry of the log, docs/api.md tables of fields, docs/bounds.md and docs/batches.md options, docs/rounds.md
tables of records, docs/switching-from-vllm.md the lists of `nanoflow/compat/`. Run it after adding a file, a result, an
entry, a field or an option: `python tools/docs.py`. With `--check` it changes nothing and fails if a page is out of
date; a test does that.

docs/benchmarks.md is written by `tools/benchmarks_page.py`.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import switching_tables as switching
from api_tables import body_fields, foreign_fields, sampling_parameters
from bounds_table import batches_table, bounds_table
from log_index import log_index
from records import readme_rows
from rounds_tables import rounds_results
from summary import where_speed_comes_from

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


def results_table() -> str:
    """The results table: five rows, each with its records or the command that makes one."""
    lines = ["| benchmark | measured | hardware | record |", "|---|---|---|---|"]
    for what, measured, hardware, names in readme_rows():
        records = ", ".join(f"[JSON](benchmarks/results/{name}.json)" for name in names.split())
        lines.append(f"| {what} | {measured} | {hardware} | {records} |")
    return "\n".join(lines)


# Each page with its generated parts.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": results_table, "speed": where_speed_comes_from},
    "docs/architecture.md": {"tree": file_tree},
    "docs/log/index.md": {"entries": log_index},
    "docs/bounds.md": {"bounds": bounds_table},
    "docs/batches.md": {"batches": batches_table},
    "docs/rounds.md": {"results": rounds_results},
    "docs/api.md": {"parameters": sampling_parameters, "fields": body_fields, "foreign": foreign_fields},
    "docs/switching-from-vllm.md": {
        "engine": switching.engine_known,
        "engine-foreign": switching.engine_foreign,
        "speculative-foreign": switching.speculative_foreign,
        "server": switching.server_known,
        "server-foreign": switching.server_foreign,
        "sampling": switching.sampling_known,
        "sampling-foreign": switching.sampling_foreign,
        "calls": switching.calls,
        "imports": switching.imports,
        "missing": switching.missing,
    },
}


def filled(page: str) -> str:
    """A page with its generated parts made anew."""
    text = (ROOT / page).read_text()
    for name, make in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise SystemExit(f"{page} has no part marked {name!r}")
        text = f"{text[: found.end(1)]}{make()}\n{text[found.start(2) :]}"
    return text


def main() -> None:
    """Fill in or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    args = parser.parse_args()
    for page in PAGES:
        path, wanted = ROOT / page, filled(page)
        if args.check and path.read_text() != wanted:
            raise SystemExit(f"{page} is out of date: run python tools/docs.py")
        if not args.check:
            path.write_text(wanted)


if __name__ == "__main__":
    main()
