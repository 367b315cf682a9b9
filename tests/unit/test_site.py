"""A site where another package named nanoflow lies over ours is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nanoflow
import nanoflow_engine

ROOT = Path(__file__).resolve().parents[2]


def install(site: Path, files: dict[str, str], *, name: str = "nanoflow", version: str = "9.9") -> None:
    """Put a distribution into a folder, with a record of its files."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, text in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)


THEIRS = {"nanoflow/__init__.py": "VERSION = 9\n", "nanoflow/workflow.py": ""}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which distributions are looked for, and no other."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_all_is_well_without_the_other_package(site: Path) -> None:
    assert nanoflow_engine.site_problem() is None


def test_the_other_package_is_named(site: Path) -> None:
    install(site, THEIRS)
    problem = nanoflow_engine.site_problem()
    assert problem is not None and "\n" not in problem
    assert "named nanoflow too (nanoflow 9.9)" in problem and "pip install nanoflow-engine" in problem


@pytest.mark.parametrize(
    "files",
    [
        {"nanoflow/__init__.py": "", "nanoflow/engine/llm.py": ""},  # as a copy
        {"__editable__.nanoflow-0.1.0.pth": "src"},  # as a link to the sources
    ],
)
def test_ours_under_the_name_that_it_had_is_no_other(site: Path, files: dict[str, str]) -> None:
    install(site, files, version=nanoflow.__version__)
    assert nanoflow_engine.site_problem() is None


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where a site goes before everything else; our start is found, as in an installation beside it."""
    (site / "nanoflow_engine").symlink_to(ROOT / "src" / "nanoflow_engine")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT / "src")))}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=site)


@pytest.mark.parametrize("is_known", [True, False], ids=["with a record", "files alone"])
def test_the_start_refuses_a_site_where_it_lies_over_ours(tmp_path: Path, is_known: bool) -> None:
    install(tmp_path, THEIRS)
    if not is_known:
        (tmp_path / "nanoflow-9.9.dist-info" / "RECORD").unlink()
    done = run(tmp_path, "-m", "nanoflow_engine", "--version")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
    assert done.stderr.startswith("nanoflow: error: ") and "pip uninstall -y nanoflow nanoflow-engine" in done.stderr


def test_a_first_file_that_is_not_ours_is_seen_without_any_record(tmp_path: Path) -> None:
    files = {"nanoflow/__init__.py": "VERSION = 9\n", "nanoflow/engine/llm.py": "", "nanoflow/cli/main.py": ""}
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    done = run(tmp_path, "-m", "nanoflow_engine", "--version")
    assert done.returncode == 1 and "not all there, or another package's" in done.stderr


def test_the_start_runs_the_command(tmp_path: Path) -> None:
    for module in ("nanoflow_engine", "nanoflow"):
        (tmp_path / module).mkdir()
        done = run(tmp_path / module, "-m", module, "--version")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"nanoflow {nanoflow.__version__}\n"


def test_the_distribution_has_a_name_of_its_own_and_both_commands() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == nanoflow_engine.DISTRIBUTION == "nanoflow-engine"
    assert project["scripts"] == dict.fromkeys(("nanoflow", "nanoflow-engine"), "nanoflow_engine:main")
    extras = [extra for group in project["optional-dependencies"].values() for extra in group]
    assert not [extra for extra in extras if extra.startswith("nanoflow[")]
