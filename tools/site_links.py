"""Links of pages: which there are, whether they lead somewhere, and where the site has files that are not in docs/.

Pure functions of texts and paths, which tests run without building the site. The site is built by mkdocs
(`mkdocs.yml`), for which `site_hooks.py` calls them; the built HTML is checked by `check_site.py`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that lie at the root of the repository, by their names in the site.
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Where the site keeps linked files of the repository that are no pages.
OUTSIDE = "repository"
# Links and pictures; text may go over a line's end, as may its own brackets, but a target has neither blanks nor ends.
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()([^()\s]+)((?:\s+\"[^\"]*\")?\))")
_FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1[`~]* *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link of a page.

    Attributes:
        target: What it leads to, as it is written.
        path: The file's path in the repository; None for an address of another site.
        anchor: The heading that it leads to; empty without one.
    """

    target: str
    path: str | None
    anchor: str


def links(text: str, page: str) -> Iterator[Link]:
    """All links of a page but those in code.

    Args:
        text: The page in Markdown.
        page: Its path in the repository.
    """
    for found in _LINK.finditer(without_code(text)):
        yield _link(found[2], page)


def _link(target: str, page: str) -> Link:
    if re.match(r"[a-z][a-z0-9+.-]*:|//", target):
        return Link(target=target, path=None, anchor="")
    path, _, anchor = target.partition("#")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    return Link(target=target, path=place, anchor=anchor)


def without_code(text: str) -> str:
    """A page without blocks and spans of code: what stands there is shown, not followed."""
    return _CODE.sub("", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub both make them of plain words."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip()
        name = re.sub(r"[-\s]+", "-", plain)
        place = 1
        while (unique := name if place == 1 else f"{name}_{place - 1}") in found:
            place += 1
        found.add(unique)
    return found


def faults(pages: dict[str, str], root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the links of some pages, one line a link.

    Args:
        pages: Texts by their paths in the repository.
        root: The repository.
    """
    known = {page: anchors(text) for page, text in pages.items()}
    for page, text in pages.items():
        for link in links(text, page):
            if link.path is None:
                continue
            if link.path.startswith("../") or link.target.startswith("/"):
                yield f"{page}: {link.target} leads out of the repository"
            elif not _is_exactly_there(root, link.path):
                yield f"{page}: {link.target} leads nowhere"
            elif link.anchor and link.path in known and link.anchor not in known[link.path]:
                yield f"{page}: {link.path} has no heading #{link.anchor}"


def _is_exactly_there(root: Path, path: str) -> bool:
    """Whether a file is there under exactly that name, also on systems that do not tell capital letters apart."""
    place = root / path
    return place.is_file() and place.name in {each.name for each in place.parent.iterdir()}


def for_site(text: str, page: str) -> tuple[str, dict[str, str]]:
    """A page with links that hold in the site, and the files outside docs/ that it needs there.

    Args:
        text: The page in Markdown.
        page: Its path in the repository.

    Returns:
        The text, and a mapping of places in the site to paths in the repository.
    """
    needed: dict[str, str] = {}
    here = site_place(page)

    def moved(match: re.Match[str]) -> str:
        link = _link(match[2], page)
        if link.path is None or link.path == page:
            return match[0]
        place = site_place(link.path)
        if place.startswith(f"{OUTSIDE}/"):
            needed[place] = link.path
        relative = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{match[1]}{relative}{'#' if link.anchor else ''}{link.anchor}{match[3]}"

    return _outside_code(text, lambda plain: _LINK.sub(moved, plain)), needed


def site_place(path: str) -> str:
    """Where a file of the repository is in the site; sources are texts there, so that a browser shows them."""
    for place, source in ROOT_PAGES.items():
        if source == path:
            return place
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    shown = path + ".txt" if PurePosixPath(path).suffix in (".py", ".md", ".toml") else path
    return f"{OUTSIDE}/{shown}"


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change what is no code, and leave blocks and spans as they are."""
    parts, place = [], 0
    for found in sorted((*_FENCE.finditer(text), *_CODE.finditer(text)), key=lambda each: each.start()):
        if found.start() >= place:
            parts += [text[place : found.start()], found[0]]
            place = found.end()
    parts.append(text[place:])
    # A link's text may hold code, so the pieces are marked, joined, changed as one, and put back.
    codes = parts[1::2]
    joined = "".join(part if number % 2 == 0 else f"\0{number // 2}\0" for number, part in enumerate(parts))
    return re.sub(r"\0(\d+)\0", lambda found: codes[int(found[1])], change(joined))
