"""Counters shared by several processes: each writes to its own cells, and any process can sum the cells of all.

A process writes to an array of float64. If it is alone, the array is in memory. Otherwise it is the process's row of an
unnamed file that all processes inherit; the file disappears when the last of them has ended, in whatever way. A process
that replaces another continues with its row, so a sum never decreases. Cells are assigned in order, so processes that
request the same cells in the same order agree on the meaning of each.
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
    """A file descriptor of `num_rows` rows of cells, all zero; it is closed at the end of the block."""
    with tempfile.TemporaryFile(prefix="nanoflow-") as file:
        os.ftruncate(file.fileno(), num_rows * MAX_CELLS * np.float64().itemsize)
        yield file.fileno()


class Cells:
    """The cells of one process.

    Args:
        file: Descriptor of the shared rows, from `shared_rows`; None for a process that is alone.
        row: The row of this process; no other process may use it while this one lives.
    """

    def __init__(self, file: int | None = None, row: int = 0) -> None:
        self._num_used = 0
        if file is None:
            self._rows: Floats = np.zeros((1, MAX_CELLS))
        else:
            self._rows = np.frombuffer(mmap.mmap(file, 0), np.float64).reshape(-1, MAX_CELLS)
        self._own: Floats = self._rows[row]

    def take(self, num_cells: int) -> slice:
        """Assign cells that are not in use yet.

        Raises:
            ValueError: There are not enough cells.
        """
        if self._num_used + num_cells > MAX_CELLS:
            raise ValueError(f"there are no more than {MAX_CELLS} cells")
        self._num_used += num_cells
        return slice(self._num_used - num_cells, self._num_used)

    def own(self, cells: slice) -> Floats:
        """A view of this process's cells, to write to."""
        return self._own[cells]

    def rows(self, cells: slice) -> Floats:
        """The cells of all processes, one row for each."""
        return self._rows[:, cells]

    def total(self) -> Floats:
        """For each cell, the sum over all processes."""
        total: Floats = self._rows.sum(axis=0)
        return total


class CounterCell:
    """A counter."""

    def __init__(self, cells: Cells) -> None:
        self.place = cells.take(1)
        self._own = cells.own(self.place)

    def inc(self, amount: float = 1.0) -> None:
        """Add to it."""
        self._own[0] += amount


class HistogramCells:
    """A histogram: the number of observations in each bucket, and their sum.

    Args:
        cells: One cell for each bound, one for observations above the last bound, and one for the sum.
        bounds: Upper bounds of the buckets, ascending.
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
        """Count several observations."""
        array = np.asarray(values, dtype=np.float64)
        places = np.searchsorted(self._array, array)
        self._own[:-1] += np.bincount(places, minlength=len(self.bounds) + 1)
        self._own[-1] += array.sum()
