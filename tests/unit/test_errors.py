"""What of an exception's message reaches people: our own words whole, what a library quotes cut."""

from __future__ import annotations

import pytest

from nanoflow.errors import brief_line, one_line


@pytest.mark.parametrize(
    ("message", "line"), [("a\nb", "a"), ("  a ", "a"), ("", "ValueError"), ("x" * 1000, "x" * 1000)]
)
def test_one_line_is_whole(message: str, line: str) -> None:
    assert one_line(ValueError(message)) == line


def test_a_brief_line_is_cut() -> None:
    assert brief_line(ValueError("x" * 300)) == "x" * 300
    assert brief_line(ValueError("x" * 301 + "\nb")) == "x" * 297 + "..."
