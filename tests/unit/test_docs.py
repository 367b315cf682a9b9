"""The documentation is true: generated parts are up to date, linked files exist, and files keep to their budget."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_readme_is_up_to_date() -> None:
    check = subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_file_names_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text):
        places = (ROOT, ROOT / "src", ROOT / "src/nanoflow")
        is_an_example = "your_" in name
        assert is_an_example or any((place / name).exists() for place in places), f"{page.name} names {name}"


def test_a_result_shows_median_and_range_of_its_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spread = runpy.run_path(str(ROOT / "tools/docs.py"))["spread"]
    assert spread([25_100.0, 25_300.0, 25_000.0], ",.0f", " tokens/s") == "25,100 (25,000 to 25,300) tokens/s"
    assert spread([26.11, 26.14], ".1f", " mJ/token") == "26.1 mJ/token"
    assert spread([], ".1f", " mJ/token") == ""


def test_no_source_file_is_too_long() -> None:
    too_long = [path.name for path in (ROOT / "src").rglob("*.py") if len(path.read_text().splitlines()) > 350]
    assert not too_long
