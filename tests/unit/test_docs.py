"""The documentation is true: generated parts are up to date, linked files exist, and files keep to their budget."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CURRENT = [page for page in PAGES if not re.match(r"\d{4}-", page.name)]
# Pages that are written by hand, as a whole or but for generated tables.
WRITTEN = [page for page in PAGES if page.name != "benchmarks.md"]


def test_readme_is_up_to_date() -> None:
    check = subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.fixture(scope="module")
def site_links() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import site_links
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return site_links


def test_links_lead_somewhere(site_links: ModuleType) -> None:
    """Files and headings, in docs/ and outside, before the site is built."""
    cards = [path for folder in ("src", "tests", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.md")]
    pages = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in [*PAGES, *cards]}
    assert not list(site_links.faults(pages))
    assert sum(1 for page, text in pages.items() for _ in site_links.links(text, page)) > 200


def test_every_page_is_reached_from_the_readme(site_links: ModuleType) -> None:
    pages = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
    found, waiting = {"README.md"}, ["README.md"]
    while waiting:
        page = waiting.pop()
        new = {link.path for link in site_links.links(pages[page], page)} & pages.keys() - found
        found |= new
        waiting += new
    assert pages.keys() - found == {"docs/index.md"}, "the home of the site, which is the README's for the repository"


def test_the_home_of_the_site_leads_where_the_readme_leads(site_links: ModuleType) -> None:
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/index.md")}
    readme, home = ({link.path for link in site_links.links(text, page)} for page, text in pages.items())
    others = {"CHANGELOG.md", "src/nanoflow/default_model/README.md"}
    assert {path for path in readme - home if path.endswith(".md")} == others, "changes are in the navigation"


def test_the_navigation_of_the_site_has_every_page() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]+\.md\b", config.partition("\nnav:")[2]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    entries = {page for page in there if page.startswith("log/2")}
    assert there - entries == named - {"contributing.md", "changelog.md", "reference/index.md"}


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_named_sources_are_there(page: Path) -> None:
    """Not in the log: an entry names what there was on its day."""
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", page.read_text(encoding="utf-8")):
        places = (ROOT, ROOT / "src", ROOT / "src/nanoflow")
        is_an_example = "your_" in name
        assert is_an_example or any((place / name).exists() for place in places), f"{page.name} names {name}"


def test_pages_that_sources_name_are_there() -> None:
    """A comment that says where a number comes from names a page that has it."""
    named: dict[str, str] = {}
    for folder in ("src", "tests", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"\bdocs/[\w./-]+\.md\b", path.read_text(encoding="utf-8")):
                named[name] = path.name
    # Pages of the tests' own repositories, and the pattern of an entry's name.
    others = {"docs/other.md", "docs/page.md", "docs/log/entry.md", "docs/log/page.md", "docs/log/DATE-topic.md"}
    missing = {name: source for name, source in named.items() if name not in others and not (ROOT / name).is_file()}
    assert not missing and len(named) > len(others) + 5


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    """Tables and code need their width."""
    is_code, long = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        is_code ^= line.lstrip().startswith("```")
        if len(line) > 120 and not is_code and not line.startswith("|"):
            long.append(number)
    assert not long, f"{page.name}: lines {long}"


def test_tests_that_pages_name_are_there() -> None:
    named = [
        name for page in WRITTEN for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 20
    for name in named:
        file, _, test = name.partition("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_every_entry_of_the_log_fits_on_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import log_index

    entries = list(log_index.entries())
    assert len(entries) == len(list((ROOT / "docs/log").glob("*.md"))) - 1 >= 50
    assert [entry.date for entry in entries] == sorted((entry.date for entry in entries), reverse=True)
    for entry in entries:
        assert len(entry.path.read_text(encoding="utf-8").splitlines()) <= 60, entry.path.name
        assert entry.parts["Question"].endswith("?") and len(entry.parts["Answer"]) <= 240, entry.path.name


def test_an_entry_without_its_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import log_index

    parts = "\n\n".join(f"**{part}.** {part} of it,\nin two lines?" for part in log_index.PARTS)
    path = tmp_path / "2026-01-02-topic.md"
    path.write_text(f"# Title\n\n{parts}\n")
    (tmp_path / "2026-01-03-other.md").write_text(f"# Other\n\n{parts}\n")
    first, second = log_index.entries(tmp_path)
    assert (first.date, second.title) == ("2026-01-03", "Title")
    row = "| 2026-01-02 | [Question of it, in two lines?](2026-01-02-topic.md) | Answer of it, in two lines? |"
    assert row in log_index.log_index(tmp_path)
    path.write_text(f"# Title\n\n{parts}\n".replace("**Method.**", "**How.**"))
    with pytest.raises(ValueError, match=r"2026-01-02-topic\.md: an entry has these parts in this order: Question"):
        list(log_index.entries(tmp_path))
    path.rename(tmp_path / "topic.md")
    with pytest.raises(ValueError, match=r"topic\.md: an entry is named DATE-topic\.md"):
        list(log_index.entries(tmp_path))


def test_a_result_shows_median_and_range_of_its_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spread = runpy.run_path(str(ROOT / "tools/docs.py"))["spread"]
    assert spread([25_100.0, 25_300.0, 25_000.0], ",.0f", " tokens/s") == "25,100 (25,000 to 25,300) tokens/s"
    assert spread([26.11, 26.14], ".1f", " mJ/token") == "26.1 mJ/token"
    assert spread([], ".1f", " mJ/token") == ""


def test_no_source_file_is_too_long() -> None:
    too_long = [path.name for path in (ROOT / "src").rglob("*.py") if len(path.read_text().splitlines()) > 350]
    assert not too_long
