"""Estimate iteration times from batches timed at the engine's start and from the iterations that have run since.

A GPU that is warm or near its power limit is slower than at the start, and on a CPU nothing is timed at the start. So
the estimate is fitted again from time to time, to the first samples and to the latest ones. `plan/iteration_time.py`
has the form of the estimate, `scheduler/pace.py` uses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime, fit_iteration_time

Sample = tuple[BatchShape, float]

# How many of the latest samples are kept; how many iterations there are to a sample; how many new samples to a fit.
_NUM_LATEST = 96
_EVERY = 4
_FIT_EVERY = 24


class IterationTimes:
    """An estimate of iteration times that is updated with what is observed.

    Args:
        samples: Shapes and seconds of batches timed at the start.

    Attributes:
        estimate: The estimate now; None before there are samples.
    """

    def __init__(self, samples: Sequence[Sample] = ()) -> None:
        self._first = list(samples)
        self._latest: deque[Sample] = deque(maxlen=_NUM_LATEST)
        self._num_observed = 0
        self.estimate: IterationTime | None = fit_iteration_time(self._first) if self._first else None

    def observe(self, shape: BatchShape, time_s: float) -> bool:
        """Note the time of an iteration of this shape; True if the estimate has changed."""
        self._num_observed += 1
        if self._num_observed % _EVERY or time_s <= 0:
            return False
        self._latest.append((shape, time_s))
        if self._num_observed % (_EVERY * _FIT_EVERY):
            return False
        self.estimate = fit_iteration_time([*self._first, *self._latest])
        return True
