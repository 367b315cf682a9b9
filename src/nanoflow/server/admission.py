"""Bound the completions and tokens in the server, over all front ends; a call beyond that is refused at once.

Each process counts what it has admitted, and reads the counts of the others (`counters.py`). What a process
that was killed leaves there counts no more: the process is named beside it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow.bounds import ServerBounds
from nanoflow.engine.messages import EngineFacts
from nanoflow.server.counters import Counters
from nanoflow.server.errors import ApiError

RETRY_AFTER_S = 1
# Calls of priority "batch" find room up to a part of it, one in so many.
_BACKGROUND_PART = 2


class Ledger:
    """Completions and tokens that the processes have admitted and that have not ended.

    Args:
        counters: Counters of this process, with access to those of others; None for a single process.
    """

    def __init__(self, counters: Counters | None = None) -> None:
        self._counters = Counters() if counters is None else counters
        # The process, completions, tokens.
        self._place = self._counters.take(3)
        self._own = self._counters.own(self._place)
        # A process that died may have counted here.
        self._own[:] = os.getpid(), 0, 0

    def add(self, num_completions: int, num_tokens: int) -> None:
        """Add to the numbers of this process; negative values subtract."""
        self._own[1:] += num_completions, num_tokens

    def total(self) -> tuple[int, int]:
        """Completions and tokens, of all processes that live."""
        living = [row for row in self._counters.rows(self._place) if row[0] and _lives(int(row[0]))]
        return int(sum(row[1] for row in living)), int(sum(row[2] for row in living))


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Admits calls while there is room.

    Attributes:
        bounds: Bounds on what is in the server.
        facts: Facts of the engine, which say how much runs at once.
        ledger: What is in the server now.
    """

    bounds: ServerBounds
    facts: EngineFacts
    ledger: Ledger

    @contextlib.contextmanager
    def room(self, num_completions: int, num_tokens: int = 0, *, is_background: bool = False) -> Iterator[None]:
        """Count a call, or more tokens of one, until the end of the block.

        Args:
            num_completions: Number of prompts times n.
            num_tokens: Tokens of the prompts, counted once for each completion.
            is_background: The call has the priority "batch".

        Raises:
            ApiError: There is no room (429), and the answer says when to try again; or never will be (400).
        """
        self.check(num_completions, num_tokens, is_background=is_background)
        self.ledger.add(num_completions, num_tokens)
        try:
            yield
        finally:
            self.ledger.add(-num_completions, -num_tokens)

    def check(self, num_completions: int, num_tokens: int = 0, *, is_background: bool = False) -> None:
        """Refuse a call if there is no room for it (429), without counting it.

        Calls of priority "batch" find room only while less than half of it is taken: the rest is for others. A call
        that would find none in an empty server either is refused for good (400), as a batch asks again until it is
        taken.
        """
        completions, tokens = self.ledger.total()
        part = _BACKGROUND_PART if is_background else 1
        most = self.facts.max_num_seqs + self.bounds.max_queued_requests
        for count, more, limit, what in (
            (completions, num_completions, max(most // part, 1), "completions"),
            (tokens, num_tokens, self.bounds.max_queued_tokens // part, "tokens of prompts"),
        ):
            if more > limit:
                whose = " of a call of priority batch" if is_background else ""
                message = f"the call has {more} {what}, and the server takes at most {limit}{whose}"
                raise ApiError(400, message, code="too_large")
            if more and count + more > limit:
                message = f"the server has {count} {what} and takes at most {limit}: no room for {more} more"
                raise ApiError(
                    429, f"{message}; try again", code="overloaded", headers={"retry-after": str(RETRY_AFTER_S)}
                )


def _lives(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
