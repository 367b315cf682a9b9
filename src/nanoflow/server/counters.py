"""Counters that several processes increase, and whose sums each of them can read.

Each process writes to its own array of float64. A single process has it in memory; several have one row each of an
unnamed file that they inherit, which vanishes when the last of them has ended. A process that replaces another uses its
row, so that sums never fall. Counters are allocated in order, so processes that allocate alike agree on the meaning of
each.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

MAX_COUNTERS = 4096

Floats = NDArray[np.float64]


@contextmanager
def shared_rows(num_rows: int) -> Iterator[int]:
    """A context manager with a file descriptor of `num_rows` rows of counters, which begin at 0."""
    with tempfile.TemporaryFile(prefix="nanoflow-") as file:
        os.ftruncate(file.fileno(), num_rows * MAX_COUNTERS * np.float64().itemsize)
        yield file.fileno()


class Counters:
    """The counters of one process.

    Args:
        file: File descriptor from `shared_rows`; None for a single process.
        row: Row of this process, which no other running process uses.
    """

    def __init__(self, file: int | None = None, row: int = 0) -> None:
        self._num_used = 0
        if file is None:
            self._rows: Floats = np.zeros((1, MAX_COUNTERS))
        else:
            self._rows = np.frombuffer(mmap.mmap(file, 0), np.float64).reshape(-1, MAX_COUNTERS)
        self._own: Floats = self._rows[row]

    def take(self, num_counters: int) -> slice:
        """Allocate counters; returns their indices.

        Raises:
            ValueError: There are not that many.
        """
        if self._num_used + num_counters > MAX_COUNTERS:
            raise ValueError(f"there are no more than {MAX_COUNTERS} counters")
        self._num_used += num_counters
        return slice(self._num_used - num_counters, self._num_used)

    def own(self, counters: slice) -> Floats:
        """This process's values of some counters, as a view to write to."""
        return self._own[counters]

    def rows(self, counters: slice) -> Floats:
        """The values of all processes, one row each."""
        return self._rows[:, counters]

    def total(self) -> Floats:
        """The sums over all processes, of all counters."""
        total: Floats = self._rows.sum(axis=0)
        return total


class Counter:
    """A number that only grows."""

    def __init__(self, counters: Counters) -> None:
        self.place = counters.take(1)
        self._own = counters.own(self.place)

    def inc(self, amount: float = 1.0) -> None:
        """Add to it."""
        self._own[0] += amount


class Histogram:
    """Numbers of observations between bounds, and the sum of observations.

    Args:
        counters: Takes one for each bound, one for observations above the last bound, and one for the sum.
        bounds: Upper bounds, ascending.
    """

    def __init__(self, counters: Counters, bounds: Sequence[float]) -> None:
        self.bounds = tuple(map(float, bounds))
        self.place = counters.take(len(bounds) + 2)
        self._own = counters.own(self.place)
        self._array = np.array(self.bounds)

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._own[bisect_left(self.bounds, value)] += 1
        self._own[-1] += value

    def observe_many(self, values: Sequence[float]) -> None:
        """The same as `observe` for each value, in one step."""
        array = np.asarray(values, dtype=np.float64)
        places = np.searchsorted(self._array, array)
        self._own[:-1] += np.bincount(places, minlength=len(self.bounds) + 1)
        self._own[-1] += array.sum()
