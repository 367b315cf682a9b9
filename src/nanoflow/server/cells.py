"""Numbers that several processes count up, each in cells of its own, and any of them can add up.

Every process writes to an array of float64: in memory if it is alone, else in a file of its own in a folder that they
share. The file stays when its process ends, so that a sum never falls. Cells are handed out in order, so processes that
ask for the same cells in the same order agree on what each cell is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_CELLS = 4096
_SUFFIX = ".cells"

Floats = NDArray[np.float64]


class Cells:
    """The cells of one process.

    Args:
        folder: Where the processes keep their files; None for a process that is alone.
        name: Of this process's file, not used before in the folder.

    Attributes:
        folder: As given.
    """

    def __init__(self, folder: Path | None = None, name: str = "0") -> None:
        self.folder = self._folder = folder
        self._num_used = 0
        if folder is None:
            self._own: Floats = np.zeros(MAX_CELLS)
        else:
            self._own = np.memmap(folder / f"{name}{_SUFFIX}", np.float64, "w+", shape=(MAX_CELLS,))

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

    def total(self) -> Floats:
        """The sum over all processes, of all cells."""
        if self._folder is None:
            return self._own.copy()
        total = np.zeros(MAX_CELLS)
        for path in self._folder.glob(f"*{_SUFFIX}"):
            # A process that has just started may not have given its file its size yet.
            numbers = np.fromfile(path, np.float64, MAX_CELLS)
            total[: len(numbers)] += numbers
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
