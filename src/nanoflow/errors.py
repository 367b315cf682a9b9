"""What an exception says, in one line, for whoever asked. Which exceptions are a user's is not known here."""

from __future__ import annotations

# Libraries quote what they were given, however long that is.
_MOST_CHARS = 300


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, cut where it is very long; its class if it has none."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= _MOST_CHARS else line[: _MOST_CHARS - 3] + "..."
