"""No function is longer than CONTRIBUTING says: its sentence and this test name the same number of lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src"
MAX_LINES = 60

# GPU programs that a compiler takes as a whole: one program, one function, and one function of that name. Everything
# else is cut. An entry for a function that is short enough or gone fails, and so does one that is no GPU program.
ONE_PROGRAM = {
    "choose_program",
    "filtered",
    "prefill_program",
    "search",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    """Every function of a file, methods and inner functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield node


def num_lines(function: Function) -> int:
    """Lines from `def` to the last statement, docstring and inner functions counted, decorators not."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def too_long(source: str, max_lines: int = MAX_LINES) -> dict[str, int]:
    """Functions over the limit and their lines, by name."""
    return {each.name: num_lines(each) for each in functions(source) if num_lines(each) > max_lines}


def is_gpu_program(function: Function) -> bool:
    """Whether Triton or Gluon compiles it."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def long_functions() -> list[tuple[str, str, int, bool]]:
    """File, name, lines, and whether it is a GPU program, of every function of the package that is too long."""
    return [
        (path.name, each.name, num_lines(each), is_gpu_program(each))
        for path in sorted(SOURCES.rglob("*.py"))
        for each in functions(path.read_text(encoding="utf-8"))
        if num_lines(each) > MAX_LINES
    ]


def test_no_function_is_too_long() -> None:
    found, allowed = long_functions(), ONE_PROGRAM
    over = [f"{file}: {name} has {lines} lines" for file, name, lines, _ in found if name not in allowed]
    assert not over, f"functions of more than {MAX_LINES} lines; cut them where a part has a name"
    names = [name for _, name, _, _ in found]
    assert sorted(names) == sorted(allowed), "short enough, gone, or twice: mend the list"


def test_only_gpu_programs_are_excused() -> None:
    """A function is excused because a GPU compiler takes it whole, not because somebody put it on the list."""
    others = [
        f"{file}: {name}" for file, name, _, is_program in long_functions() if name in ONE_PROGRAM and not is_program
    ]
    assert not others


def test_contributing_names_these_limits() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{MAX_LINES} lines", text) and re.search(r"\b350 lines", text)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_measure_counts_what_a_reader_sees(kind: str) -> None:
    body = "\n".join(f"    x = {number}" for number in range(MAX_LINES - 1))
    assert not too_long(f"{kind} f():\n{body}\n")
    assert too_long(f"{kind} f():\n{body}\n    x = 0\n") == {"f": MAX_LINES + 1}
    inner = "\n".join(f"    {line}" for line in f"{kind} g():\n{body}\n    x = 0".splitlines())
    assert too_long(f"class C:\n{inner}\n") == {"g": MAX_LINES + 1}
    assert too_long(f"@decorated(\n    1,\n)\n{kind} f():\n{body}\n") == {}
