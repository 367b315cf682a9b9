"""Links of pages: what is found, what is refused, and where they lead in the site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site_links(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import site_links

    return site_links


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs/log").mkdir(parents=True)
    (tmp_path / "src").mkdir()
    for name in ("README.md", "docs/other.md", "docs/log/entry.md", "src/code.py", "docs/plan.svg"):
        (tmp_path / name).write_text("# A heading\n")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "line", "fault"),
    [
        ("docs/page.md", "[a](other.md) [b](other.md#a-heading) [c](log/entry.md) ![d](plan.svg)", None),
        ("docs/page.md", "[a](../src/code.py), [b](https://example.com/none), [c](#here)", None),
        ("docs/log/page.md", "[a](../other.md) [b](entry.md) [c](../../src/code.py)", None),
        ("README.md", "[a](docs/other.md)", None),
        ("docs/page.md", "`[a](nothing.md)` and ``[`b`](nothing.md)``", None),
        ("docs/page.md", "```\n[a](nothing.md)\n```", None),
        ("docs/page.md", "[a](nothing.md)", "docs/page.md: nothing.md leads nowhere"),
        ("docs/page.md", "[a text with `code`](nothing.md)", "docs/page.md: nothing.md leads nowhere"),
        ("docs/page.md", "[two\nlines](nothing.md)", "docs/page.md: nothing.md leads nowhere"),
        ("docs/page.md", "![a picture](nothing.svg)", "docs/page.md: nothing.svg leads nowhere"),
        ("docs/page.md", "[![a](plan.svg)](nothing.md)", "docs/page.md: nothing.md leads nowhere"),
        ("docs/page.md", "[a](Other.md)", "docs/page.md: Other.md leads nowhere"),
        ("docs/page.md", "[a](log)", "docs/page.md: log leads nowhere"),
        ("docs/page.md", "[a](other.md#none)", "docs/page.md: docs/other.md has no heading #none"),
        ("docs/page.md", "[a](#none)", "docs/page.md: docs/page.md has no heading #none"),
        ("docs/page.md", "[a](../../other/x.md)", "docs/page.md: ../../other/x.md leads out of the repository"),
        ("docs/page.md", "[a](/docs/other.md)", "docs/page.md: /docs/other.md leads out of the repository"),
        ("docs/log/page.md", "[a](other.md)", "docs/log/page.md: other.md leads nowhere"),
    ],
)
def test_faults_of_links(site_links: ModuleType, repository: Path, page: str, line: str, fault: str | None) -> None:
    text = f"# Here\n\n{line}\n"
    (repository / page).write_text(text)
    pages = {page: text, "docs/other.md": "# A heading\n"}
    assert list(site_links.faults(pages, repository)) == ([] if fault is None else [fault])


def test_anchors_of_headings(site_links: ModuleType) -> None:
    text = "# A title\n\n## 1. The profile (`profile/table.py`)\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n"
    assert site_links.anchors(text) == {"a-title", "1-the-profile-profiletablepy", "twice", "twice_1"}


@pytest.mark.parametrize(
    ("page", "link", "moved", "needed"),
    [
        ("docs/page.md", "other.md#x", "other.md#x", None),
        ("docs/page.md", "../README.md", "index.md", None),
        ("docs/log/entry.md", "../../CONTRIBUTING.md", "../contributing.md", None),
        ("CONTRIBUTING.md", "docs/log/index.md", "log/index.md", None),
        ("docs/page.md", "../src/a.py", "repository/src/a.py.txt", "src/a.py"),
        ("docs/log/entry.md", "../../results/x.json", "../repository/results/x.json", "results/x.json"),
        ("CHANGELOG.md", "src/model/README.md", "repository/src/model/README.md.txt", "src/model/README.md"),
        ("docs/page.md", "https://example.com/../x.py", "https://example.com/../x.py", None),
        ("docs/page.md", "#here", "#here", None),
    ],
)
def test_where_links_lead_in_the_site(
    site_links: ModuleType, page: str, link: str, moved: str, needed: str | None
) -> None:
    text = f"A [link `with code`]({link}), `[a]({link})`.\n\n```\n[a]({link})\n```\n"
    shown, files = site_links.for_site(text, page)
    assert shown == f"A [link `with code`]({moved}), `[a]({link})`.\n\n```\n[a]({link})\n```\n"
    assert list(files.values()) == ([] if needed is None else [needed])


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="b.html#there">x</a> <a href="https://example.com">x</a> <a href=".">x</a>', None),
        ('<a href="c.html">x</a>', "a.html links c.html, which is not there"),
        ('<a href="b.html#none">x</a>', "a.html links b.html#none, a place that is not on the page"),
        ('<img src="none.png">', "a.html links none.png, which is not there"),
        ('<script src="https://cdn.example/x.js"></script>', "a.html loads https://cdn.example/x.js from elsewhere"),
        (
            '<link rel="stylesheet" href="//fonts.example/x.css">',
            "a.html loads //fonts.example/x.css from elsewhere",
        ),
    ],
)
def test_a_built_site_is_checked(tmp_path: Path, body: str, fault: str | None) -> None:
    (tmp_path / "index.html").write_text("<html></html>")
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h1 id="there">x</h1>')
    command = [sys.executable, str(ROOT / "tools/check_site.py"), str(tmp_path)]
    check = subprocess.run(command, capture_output=True, text=True)
    assert (check.returncode == 0) == (fault is None), check.stdout
    assert fault is None or check.stdout.splitlines() == [fault]


def test_a_site_without_pages_is_no_site(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/check_site.py"), str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode != 0
