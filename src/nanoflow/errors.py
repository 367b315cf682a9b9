"""What an exception says, in one line, for whoever asked. Which exceptions are a user's is not known here."""

from __future__ import annotations

_MOST_CHARS = 300


def one_line(error: BaseException) -> str:
    """The first line of an exception's message; its class if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def brief_line(error: BaseException) -> str:
    """`one_line`, cut where it is very long: of a library that quotes what it was given, however long that is."""
    line = one_line(error)
    return line if len(line) <= _MOST_CHARS else line[: _MOST_CHARS - 3] + "..."
