"""Exceptions as one line of text for the user."""

from __future__ import annotations

_MOST_CHARS = 300


def one_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def brief_line(error: BaseException) -> str:
    """`one_line`, shortened if it is very long. For errors of libraries, which may quote their whole input."""
    line = one_line(error)
    return line if len(line) <= _MOST_CHARS else line[: _MOST_CHARS - 3] + "..."
