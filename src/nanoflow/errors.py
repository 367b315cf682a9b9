"""What an exception says, in one line, for whoever asked. Which exceptions are a user's is not known here."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The first line of an exception's message; its class if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
