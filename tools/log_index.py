"""The index of the log, made from its entries: a line each with date, question and answer, newest first.

An entry is a file `docs/log/DATE-topic.md` with the parts of `PARTS`. What stands in them is not judged here; that an
entry has them, and keeps to a screen, is checked by `tests/unit/test_docs.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOG = Path(__file__).resolve().parent.parent / "docs/log"
# What every entry has, in this order.
PARTS = ("Question", "Answer", "Method", "Result", "Decision")
_NAME = re.compile(r"(\d{4}-\d\d-\d\d)-[a-z0-9-]+\.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry of the log.

    Attributes:
        path: Its file.
        date: When, as in the file's name.
        title: Its heading.
        parts: The first paragraph of each part, on one line, by the part's name.
    """

    path: Path
    date: str
    title: str
    parts: dict[str, str]


def entries(folder: Path = LOG) -> Iterator[Entry]:
    """All entries, newest first, those of a day by name.

    Raises:
        ValueError: A file's name has no date, or an entry has no heading, or lacks a part.
    """
    paths = [path for path in folder.glob("*.md") if path.name != "index.md"]
    for path in sorted(sorted(paths), key=lambda path: path.name[:10], reverse=True):
        yield _entry(path)


def _entry(path: Path) -> Entry:
    name, text = _NAME.fullmatch(path.name), path.read_text(encoding="utf-8")
    heading = re.match(r"# (.+)\n", text)
    if name is None or heading is None:
        raise ValueError(f"{path.name}: an entry is named DATE-topic.md and begins with a heading")
    found = re.findall(r"^\*\*(\w+)\.\*\* (.+?)\n(?=\n|\Z)", text, re.MULTILINE | re.DOTALL)
    parts = {part: " ".join(said.split()) for part, said in found}
    places = [text.find(f"**{part}.**") for part in PARTS]
    if -1 in places or places != sorted(places):
        raise ValueError(f"{path.name}: an entry has these parts in this order: {', '.join(PARTS)}")
    return Entry(path=path, date=name[1], title=heading[1], parts=parts)


def log_index(folder: Path = LOG) -> str:
    """The table of all entries, with links that hold in their folder."""
    rows = (
        f"| {each.date} | [{each.parts['Question']}]({each.path.name}) | {each.parts['Answer']} |"
        for each in entries(folder)
    )
    return "\n".join(["| date | question | answer |", "|---|---|---|", *rows])
