"""The suite of requests for structured output and tools, with the embedded model, and the table of what it lacks."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from benchmarks.robustness.server_cases import CASES, TEMPLATE, problems, unexpected

from nanoflow.config import EngineConfig

PAGE = Path(__file__).parents[2] / "docs" / "structured-output.md"


def test_every_case_passes_that_has_to() -> None:
    cases = [case for case in CASES if not case.needs_copying]
    found = asyncio.run(problems(EngineConfig(chat_template=TEMPLATE, max_model_len=1024), cases))
    assert len(found) == 37
    assert unexpected(found, copies=False) == {}
    # What is said to be lacking is lacking.
    assert all(found[case.name] for case in CASES if case.lacks is not None)


def test_there_are_as_many_as_the_page_says() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 41
    lacking = {case.name: case.lacks for case in CASES if case.lacks is not None}
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert lacking.items() <= dict(rows).items()
