"""Fenced blocks and inline commands of the documentation, as data for `test_pages.py`.

A block without a language or with that of a shell has commands; the language of any other block says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "src/nanoflow/default_model/README.md",
)
LOG = ROOT / "docs/log"
SHELLS = ("", "sh", "shell", "bash", "console")
# First words of lines that are commands.
_PROGRAMS = ("nanoflow", "python", "pip", "make", "pytest", "curl", "docker", "openssl", "git", "export", "npx", "npm")
_FENCE = re.compile(r"^ *(```+|~~~+)(.*)$")
_INLINE = re.compile(rf"`((?:[A-Z_]+=\S+ )*(?:{'|'.join(_PROGRAMS)}) [^`]+)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block.

    page, line: The page, and the line of the opening fence, from 1.
    language: The text after the fence.
    text: Its lines.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def first_line(self) -> str:
        """The first line that is not empty."""
        return next((line.strip() for line in self.text.splitlines() if line.strip()), "")

    @property
    def is_of_commands(self) -> bool:
        """True for a block of a shell that begins with a program, or with a variable set for one."""
        return self.language in SHELLS and self.first_line.removeprefix("$ ").split(" ")[0] in _PROGRAMS

    @property
    def commands(self) -> list[str]:
        """Its commands: continued lines joined, comments and prompts of the shell left out."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = (re.sub(r"\s+#\s.*$", "", line).strip().removeprefix("$ ") for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks() -> Iterator[Block]:
    """Every fenced block of every page."""
    for page in PAGES:
        fence, start, language, lines = "", 0, "", [""]
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            found = _FENCE.match(line)
            if fence and found and found[1].startswith(fence) and not found[2].strip():
                yield Block(page=name_of(page), line=start, language=language, text="\n".join(lines))
                fence = ""
            elif fence:
                lines.append(line)
            elif found:
                fence, start, language, lines = found[1], number, found[2].strip(), []
        assert not fence, f"{page}: the block of line {start} has no end"


def inline_commands() -> list[tuple[str, str]]:
    """Page and command for each command with arguments in backticks, except in the log, which is history."""
    found = []
    for page in PAGES:
        if page.parent != LOG or page.name == "index.md":
            text = re.sub(r"<!-- tree -->.*<!-- /tree -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
            found += [(name_of(page), " ".join(match.split())) for match in _INLINE.findall(text)]
    return found


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()
