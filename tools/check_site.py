"""Check the built site: every link and anchor leads somewhere, and no page loads anything from elsewhere.

`python tools/check_site.py site` after `mkdocs build`, as `make docs` does. Links of pages before they are built are
`site_links.py`'s; addresses of other sites are not asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that make a browser fetch something by itself, by element.
_FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_FETCHED_LINKS = {"stylesheet", "preload", "modulepreload", "prefetch", "icon", "preconnect", "dns-prefetch"}


class _Page(HTMLParser):
    """What a page of HTML links, loads and can be led to.

    Attributes:
        links: Targets of its links.
        loads: What a browser fetches with it.
        ids: Names of its places.
    """

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element links or loads, and its name."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and _FETCHED_LINKS & set(values.get("rel", "").split()):
            self.loads.append(values["href"])
        elif values.get(_FETCHED.get(tag, "")):
            self.loads.append(values[_FETCHED[tag]])


def main() -> None:
    """Check a site; the first faults are printed, and the status says whether there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, help="folder of the built site")
    site = parser.parse_args().site
    found = list(faults(site))
    for fault in found[:50]:
        print(fault)
    if found:
        raise SystemExit(f"{site}: {len(found)} faults")
    print(f"{site}: {len(list(site.rglob('*.html')))} pages, every link leads somewhere")


def faults(site: Path) -> Iterator[str]:
    """What is wrong with a site, one line each.

    Raises:
        SystemExit: There is no page.
    """
    pages = {path.resolve(): _read(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        raise SystemExit(f"{site} has no pages: build it with mkdocs")
    for path, page in pages.items():
        name = path.relative_to(site.resolve()).as_posix()
        for target in page.loads:
            if urlsplit(target).netloc:
                yield f"{name} loads {target} from elsewhere"
        # The page for paths that are not there is served at any depth, so its links begin at the root of a site.
        for target in page.links + page.loads if name != "404.html" else ():
            yield from _faults_of_link(name, path, target, pages)


def _faults_of_link(name: str, path: Path, target: str, pages: dict[Path, _Page]) -> Iterator[str]:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return
    place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    place = place / "index.html" if place.is_dir() else place
    if not place.is_file():
        yield f"{name} links {target}, which is not there"
    elif parts.fragment and place in pages and unquote(parts.fragment) not in pages[place].ids | {"top"}:
        yield f"{name} links {target}, a place that is not on the page"


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


if __name__ == "__main__":
    main()
