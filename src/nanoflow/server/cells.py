"""Numbers that several processes count up, each in cells of its own, and any of them can add up.

Every process writes to an array of float64: in memory if it is alone, else in its row of a file without a name that
they inherit, which is gone when the last of them has ended, however they end. A process that takes another's place goes
on in its row, so that a sum never falls. Cells are handed out in order, so processes that ask for the same cells in the
same order agree on what each cell is.
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

MAX_CELLS = 4096

Floats = NDArray[np.float64]


@contextmanager
def shared_rows(num_rows: int) -> Iterator[int]:
    """A file descriptor of so many rows of cells, all zero, for as long as the block runs."""
    with tempfile.TemporaryFile(prefix="nanoflow-") as file:
        os.ftruncate(file.fileno(), num_rows * MAX_CELLS * np.float64().itemsize)
        yield file.fileno()


class Cells:
    """The cells of one process.

    Args:
        file: Descriptor of the rows that the processes share, from `shared_rows`; None for a process that is alone.
        row: This process's, which no other uses while it lives.
    """

    def __init__(self, file: int | None = None, row: int = 0) -> None:
        self._num_used = 0
        if file is None:
            self._rows: Floats = np.zeros((1, MAX_CELLS))
        else:
            self._rows = np.frombuffer(mmap.mmap(file, 0), np.float64).reshape(-1, MAX_CELLS)
        self._own: Floats = self._rows[row]

    def take(self, num_cells: int) -> slice:
        """Hand out cells that nobody has.

        Raises:
            ValueError: There are not that many.
        """
        if self._num_used + num_cells > MAX_CELLS:
            raise ValueError(f"there are no more than {MAX_CELLS} cells")
        self._num_used += num_cells
        return slice(self._num_used - num_cells, self._num_used)

    def own(self, cells: slice) -> Floats:
        """This process's numbers, to write to."""
        return self._own[cells]

    def rows(self, cells: slice) -> Floats:
        """The numbers of all processes, a row each."""
        return self._rows[:, cells]

    def total(self) -> Floats:
        """The sum over all processes, of all cells."""
        total: Floats = self._rows.sum(axis=0)
        return total


class CounterCell:
    """A number that only grows."""

    def __init__(self, cells: Cells) -> None:
        self.place = cells.take(1)
        self._own = cells.own(self.place)

    def inc(self, amount: float = 1.0) -> None:
        """Add to it."""
        self._own[0] += amount


class HistogramCells:
    """How many observations lie up to each bound, and their sum.

    Args:
        cells: Where they stand: one for each bound, one for what lies above all, and the sum.
        bounds: Ascending.
    """

    def __init__(self, cells: Cells, bounds: Sequence[float]) -> None:
        self.bounds = tuple(map(float, bounds))
        self.place = cells.take(len(bounds) + 2)
        self._own = cells.own(self.place)
        self._array = np.array(self.bounds)

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._own[bisect_left(self.bounds, value)] += 1
        self._own[-1] += value

    def observe_many(self, values: Sequence[float]) -> None:
        """`observe` each, in one go."""
        array = np.asarray(values, dtype=np.float64)
        places = np.searchsorted(self._array, array)
        self._own[:-1] += np.bincount(places, minlength=len(self.bounds) + 1)
        self._own[-1] += array.sum()
