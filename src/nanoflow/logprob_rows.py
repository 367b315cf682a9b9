"""Log probabilities as a user reads them: one mapping of tokens for each position of a completion or a prompt.

Numbers are kept in arrays; a mapping is built when it is read. `outputs.py` uses these classes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """Natural log probability of a token at its position; rank 1 is the most probable."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
TokenText = Callable[[int], str | None]


def position_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[float], rank: int, token_text: TokenText
) -> PositionLogprobs:
    """The mapping of one position.

    Args:
        token_ids: The token at the position, then the most probable tokens in order; these may include it.
        logprobs: The log probability of each of `token_ids`.
        rank: Rank of the token at the position.
        token_text: Text of a token id.
    """
    position: PositionLogprobs = {}
    ranks = (rank, *range(1, len(token_ids)))
    for token_id, logprob, token_rank in zip(token_ids, logprobs, ranks, strict=True):
        if token_id not in position:
            position[token_id] = Logprob(logprob=logprob, rank=token_rank, decoded_token=token_text(token_id))
    return position


class LogprobRows(Sequence[PositionLogprobs]):
    """Log probabilities of the tokens of a completion, one mapping a position. Reads like a list and equals one.

    Mappings are built when they are read. Stored as objects they would cost ten times as much, most of it in the
    garbage collector, even if nobody reads them.

    Args:
        token_text: Text of a token id.
    """

    __slots__ = ("_ends", "_logprobs", "_ranks", "_token_ids", "_token_text")

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._token_ids, self._logprobs = array("q"), array("d")
        # For each position: its end in the arrays above, and the rank of its token.
        self._ends, self._ranks = array("q"), array("q")

    def add(self, token_ids: list[int], logprobs: list[float], rank: int) -> None:
        """Add a position; arguments as of `position_logprobs`."""
        self._token_ids.fromlist(token_ids)
        self._logprobs.fromlist(logprobs)
        self._ends.append(len(self._token_ids))
        self._ranks.append(rank)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> PositionLogprobs: ...
    @overload
    def __getitem__(self, place: slice) -> list[PositionLogprobs]: ...
    def __getitem__(self, place: int | slice) -> PositionLogprobs | list[PositionLogprobs]:
        if isinstance(place, slice):
            return [self._position(i) for i in range(*place.indices(len(self)))]
        return self._position(range(len(self))[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | LogprobRows) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[type[list[PositionLogprobs]], tuple[list[PositionLogprobs]]]:
        # A copy is a list, which needs no tokenizer.
        return list, (list(self),)

    def _position(self, place: int) -> PositionLogprobs:
        entries = slice(self._ends[place - 1] if place else 0, self._ends[place])
        token_ids, logprobs = self._token_ids[entries], self._logprobs[entries]
        return position_logprobs(token_ids, logprobs, self._ranks[place], self._token_text)


class PromptLogprobRows(Sequence[PositionLogprobs | None]):
    """Log probabilities of the tokens of a prompt, one mapping a position, None where there is none (yet).

    Reads like a list and equals one. Mappings are built when they are read: building those of a long prompt takes
    seconds, which must not block the loop that receives the engine's outputs.

    Args:
        num_places: Number of tokens of the prompt.
        token_text: Text of a token id.
    """

    __slots__ = ("_rows", "_token_text")

    def __init__(self, num_places: int, token_text: TokenText) -> None:
        self._rows: list[tuple[Sequence[int], Sequence[float], int] | None] = [None] * num_places
        self._token_text = token_text

    def put(
        self,
        first_place: int,
        token_ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        ranks: Sequence[int],
    ) -> None:
        """Fill consecutive positions; each list has one entry a position, as `position_logprobs` takes it.

        Raises:
            IndexError: The range goes beyond the prompt.
        """
        rows = list(zip(token_ids, logprobs, ranks, strict=True))
        if first_place < 0 or first_place + len(rows) > len(self._rows):
            raise IndexError(f"there are {len(self._rows)} places, got {len(rows)} from place {first_place} on")
        self._rows[first_place : first_place + len(rows)] = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> PositionLogprobs | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[PositionLogprobs | None]: ...
    def __getitem__(self, place: int | slice) -> PositionLogprobs | list[PositionLogprobs | None] | None:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row = self._rows[place]
        return None if row is None else position_logprobs(*row, self._token_text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | PromptLogprobRows) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[type[list[PositionLogprobs | None]], tuple[list[PositionLogprobs | None]]]:
        return list, (list(self),)
