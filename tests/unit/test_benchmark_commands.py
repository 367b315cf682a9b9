"""Every benchmark starts: it can be imported on a machine without a GPU, and its help names the command to type."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The engine's process of `benchmarks/engine/front_end.py`, which starts it.
_STARTED_BY_OTHERS = {"benchmarks.engine.front_end_engine"}


def _commands() -> list[str]:
    files = [path for path in (ROOT / "benchmarks").rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    return sorted({".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files} - _STARTED_BY_OTHERS)


@pytest.mark.parametrize("name", _commands())
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} ")


def test_there_are_commands_in_every_folder() -> None:
    folders = {name.split(".")[1] for name in _commands()}
    assert {"engine", "kernels", "ladder", "predictions", "robustness"} <= folders


def test_commands_that_are_named_exist() -> None:
    """In pages, the Makefile, sources and tools; records, the log and the changelog name what there was then."""
    texts = [ROOT / "Makefile", ROOT / "CONTRIBUTING.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts += [path for folder in ("benchmarks", "src", "tools") for path in (ROOT / folder).rglob("*.py")]
    texts.remove(ROOT / "docs/benchmarks.md")
    command = re.compile(r"(?:-m\s|`)(benchmarks(?:\.[a-z_]+)+)\b(?!\.[A-Z])")
    named = {name: path.name for path in texts for name in command.findall(path.read_text(encoding="utf-8"))}
    missing = {name: page for name, page in named.items() if importlib.util.find_spec(name) is None}
    assert not missing and len(named) > 25
