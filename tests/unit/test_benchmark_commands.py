"""Every benchmark starts: it can be imported on a machine without a GPU, and its help names the command to type."""

from __future__ import annotations

import importlib
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
