"""Tokens that a grammar forces: where a completion can go on in one way only, the way is a draft that is right.

The executor holds rows to their grammars (`executor/constraints.py`) while a batch runs. Here a second matcher of each
row follows the tokens that have been committed, since a draft has to be known before its batch is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanoflow.batch import Int32
from nanoflow.request import Request
from nanoflow.structured import Structured


class Matcher(Protocol):
    """A grammar behind some tokens, as llguidance has it."""

    def try_consume_tokens(self, tokens: list[int]) -> int:
        """Go on behind these tokens; returns how many of them the grammar has taken."""

    def compute_ff_tokens(self) -> list[int]:
        """The tokens that must come next."""


@dataclass(slots=True)
class _Row:
    """The matcher of a row, and how many of the row's tokens it is behind."""

    matcher: Matcher
    num_taken: int


class ForcedRuns:
    """Finds forced tokens of rows with a grammar.

    Args:
        new_matcher: Makes a matcher at the beginning of a grammar that has been compiled; None if it cannot be used.
    """

    def __init__(self, new_matcher: Callable[[Structured], Matcher | None]) -> None:
        self._new_matcher = new_matcher
        self._rows: dict[int, _Row] = {}

    def join(self, row: int, request: Request) -> bool:
        """Note that a request has taken a row; returns whether it has a grammar."""
        self._rows.pop(row, None)
        # What closes a bounded reasoning may come in between.
        if request.structured is not None and request.thinking is None:
            matcher = self._new_matcher(request.structured)
            if matcher is not None:
                self._rows[row] = _Row(matcher, len(request.prompt_token_ids))
        return row in self._rows

    def run(self, row: int, known: Int32, count: int) -> Int32:
        """The tokens, at most `count`, that must follow a row's known tokens (int32 [N]); none if that is not known."""
        held = self._rows.get(row)
        if held is None or count < 1:
            return np.zeros(0, np.int32)
        new = known[held.num_taken :].tolist()
        held.num_taken += len(new)
        if held.matcher.try_consume_tokens(new) < len(new):
            # The grammar has ended, or has failed, which the executor finds too.
            del self._rows[row]
            return np.zeros(0, np.int32)
        return np.array(held.matcher.compute_ff_tokens()[:count], np.int32)
