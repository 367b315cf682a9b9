"""What iterations take, learnt while the engine runs: from batches timed at its start, and from those it has run since.

A card that is warm or near its power limit is slower than one that has just begun, and on a CPU nothing is timed at the
start. So the estimate is fitted again now and then, to the first samples and to the latest ones. The form of the
estimate is `plan/iteration_time.py`'s, its use `scheduler/pace.py`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime, fit_iteration_time

Sample = tuple[BatchShape, float]

# Samples kept of what has run; one in so many iterations becomes one; the estimate follows each so many samples.
_NUM_LATEST = 96
_EVERY = 4
_FIT_EVERY = 24


class IterationTimes:
    """An estimate that follows what is observed.

    Args:
        samples: Contents and seconds of batches timed beforehand.

    Attributes:
        estimate: What iterations take now; None before anything is known.
    """

    def __init__(self, samples: Sequence[Sample] = ()) -> None:
        self._first = list(samples)
        self._latest: deque[Sample] = deque(maxlen=_NUM_LATEST)
        self._num_observed = 0
        self.estimate: IterationTime | None = fit_iteration_time(self._first) if self._first else None

    def observe(self, shape: BatchShape, time_s: float) -> bool:
        """An iteration of this shape has taken so long; True if the estimate has changed."""
        self._num_observed += 1
        if self._num_observed % _EVERY or time_s <= 0:
            return False
        self._latest.append((shape, time_s))
        if self._num_observed % (_EVERY * _FIT_EVERY):
            return False
        self.estimate = fit_iteration_time([*self._first, *self._latest])
        return True
