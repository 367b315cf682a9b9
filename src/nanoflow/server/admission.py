"""How much is in the server, of all its front ends: what would be too much is refused before the engine hears of it.

Each process writes what it has let in to a small file in the folder where all count, and reads those of the others. A
process that was killed leaves its file, which counts no more: it names the process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanoflow.bounds import ServerBounds
from nanoflow.engine.messages import EngineFacts
from nanoflow.server.errors import ApiError

RETRY_AFTER_S = 1
_SUFFIX = ".load"
# How old the list of the other processes may be.
_LIST_S = 0.2


class Ledger:
    """Completions and tokens that the processes have let in and that have not ended.

    Args:
        folder: Where the processes keep their files; None for a process that is alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._others: list[NDArray[np.int64]] = []
        self._listed_s = float("-inf")
        # The process, completions, tokens.
        self._own: NDArray[np.int64] = np.zeros(3, np.int64)
        self._path = None if folder is None else folder / f"{os.getpid()}{_SUFFIX}"
        if self._path is not None:
            self._own = np.memmap(self._path, np.int64, "w+", shape=(3,))
        self._own[0] = os.getpid()

    def add(self, num_completions: int, num_tokens: int) -> None:
        """Count more, or less if negative."""
        self._own[1] += num_completions
        self._own[2] += num_tokens

    def total(self) -> tuple[int, int]:
        """Completions and tokens, of all processes that live."""
        others = [other for other in self._list() if _lives(int(other[0]))]
        return tuple(int(self._own[place] + sum(other[place] for other in others)) for place in (1, 2))  # type: ignore[return-value]

    def _list(self) -> list[NDArray[np.int64]]:
        if self._folder is not None and time.monotonic() - self._listed_s > _LIST_S:
            self._listed_s = time.monotonic()
            paths = [path for path in self._folder.glob(f"*{_SUFFIX}") if path != self._path]
            # A process that has just started may not have given its file its size yet.
            whole = [path for path in paths if path.stat().st_size == self._own.nbytes]
            self._others = [np.memmap(path, np.int64, "r", shape=(3,)) for path in whole]
        return self._others


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Lets calls in while there is room.

    Attributes:
        bounds: How much may be in the server.
        facts: Of the engine: how much runs at once.
        ledger: What is in it.
    """

    bounds: ServerBounds
    facts: EngineFacts
    ledger: Ledger

    @contextlib.contextmanager
    def room(self, num_completions: int, num_tokens: int = 0) -> Iterator[None]:
        """Count a call, or more tokens of one, until the end of the block.

        Args:
            num_completions: Its prompts times n.
            num_tokens: Of its prompts, once for each completion.

        Raises:
            ApiError: There is no room (429); the answer says when to come again.
        """
        self.check(num_completions, num_tokens)
        self.ledger.add(num_completions, num_tokens)
        try:
            yield
        finally:
            self.ledger.add(-num_completions, -num_tokens)

    def check(self, num_completions: int, num_tokens: int = 0) -> None:
        """Refuse what there is no room for (429), and count nothing."""
        completions, tokens = self.ledger.total()
        most = self.facts.max_num_seqs + self.bounds.max_queued_requests
        for count, more, limit, what in (
            (completions, num_completions, most, "completions"),
            (tokens, num_tokens, self.bounds.max_queued_tokens, "tokens of prompts"),
        ):
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
