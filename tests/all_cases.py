"""Which cases of a sweep run: a fixed part of them, or all with NANOFLOW_ALL_CASES=1, which `make test-all` sets.

The part is the same on every machine and for every order of the cases, since it depends on their names alone. The
sweep says what must be in it. Of tests that draw cases at random, the longest draw a third as many.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, TypeVar

T = TypeVar("T")
RUNS_ALL_CASES = os.environ.get("NANOFLOW_ALL_CASES") == "1"


def rank(name: str) -> int:
    """A number that is as good as random, and always the same for a name; a sweep takes the cases with the least."""
    return zlib.crc32(name.encode())


def part(cases: Sequence[T], *, of: Iterable[T]) -> list[T]:
    """These cases, chosen by hand from all of them, or all."""
    every = list(of)
    assert all(case in every for case in cases), "no such case"
    return every if RUNS_ALL_CASES else list(cases)


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of the values of some axes: all those of all axes but the last, with whose values they take turns.

    If all cases run these are all combinations.
    """
    every = list(product(*axes))
    turns = (sum(places[:-1]) % len(axes[-1]) == places[-1] for places in product(*(range(len(axis)) for axis in axes)))
    return every if RUNS_ALL_CASES else [case for case, has_turn in zip(every, turns, strict=True) if has_turn]


def num_examples(most: int) -> int:
    """How many examples a property test draws, of those that it draws if all cases run: a third of them."""
    return most if RUNS_ALL_CASES else most // 3
