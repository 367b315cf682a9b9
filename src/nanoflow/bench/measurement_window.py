"""The measurement window of a run: the part in the steady state, without ramp-up and drain; its rate and energy.

In the steady state requests arrive as others finish, so that batches stay alike. `ProgressRecorder` notes the end of
every iteration, `find_window` finds the window in these notes, and `steady_state` computes tokens/s and energy within
it. `offline.py` runs the requests.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanoflow.device.energy import EnergySampler
from nanoflow.engine.messages import EngineStats
from nanoflow.engine.observer import FinishedRequest
from nanoflow.run_metrics import SteadyState

MIN_ITERATIONS = 20
MIN_SHARE_OF_RUN = 0.1
MIN_ENERGY_S = 2.0
_FULL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The state of a run at the end of an iteration.

    Attributes:
        time_s: When it ended, in seconds of the recorder's clock.
        num_tokens: Tokens of all iterations so far, prompts and output.
        num_running, num_waiting: Requests that run, and that wait.
        has_finished: Whether a request has finished yet.
    """

    time_s: float
    num_tokens: int
    num_running: int
    num_waiting: int
    has_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementWindow:
    """Part of a run, from the end of one iteration to the end of another; times in seconds of the recorder's clock."""

    start_s: float
    stop_s: float
    num_iterations: int
    num_tokens: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.stop_s - self.start_s


class NoSteadyState(Exception):
    """A run has no measurement window; the message says why."""


class ProgressRecorder:
    """An `Observer` that notes the end of every iteration (`progress`), and how many each plan ran, by digest.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress: list[Progress] = []
        self.plan_iterations: Counter[str] = Counter()
        self._clock = clock
        self._num_tokens = 0
        self._has_finished = False

    def observe_step(self, stats: EngineStats) -> None:
        """Note an iteration."""
        self._num_tokens += stats.iteration_tokens
        if stats.plan_digest is not None:
            self.plan_iterations[stats.plan_digest] += 1
        self.progress.append(
            Progress(
                time_s=self._clock(),
                num_tokens=self._num_tokens,
                num_running=stats.num_running,
                num_waiting=stats.num_waiting,
                has_finished=self._has_finished,
            )
        )

    def observe_first_token(self, ttft_s: float, num_prompt_tokens: int) -> None:
        """Not recorded."""

    def observe_tokens(self, num_tokens: int) -> None:
        """Not recorded."""

    def observe_next_tokens(self, latencies_s: Sequence[float]) -> None:
        """Not recorded."""

    def observe_finished(self, request: FinishedRequest) -> None:
        """From now on requests finish as well as arrive."""
        self._has_finished = True


def find_window(progress: Sequence[Progress], duration_s: float) -> MeasurementWindow:
    """The measurement window of a run.

    An iteration is in the steady state if a request has finished, others still wait, and at least 90 % of the largest
    number of requests that ever ran are running. The window reaches from the first such iteration to the last.

    Args:
        progress: The end of every iteration, in order.
        duration_s: Seconds that the whole run took.

    Raises:
        NoSteadyState: There is no such iteration, or the window has fewer than 20 iterations or less than a tenth of
            the run's time.
    """
    full = _FULL * max((sample.num_running for sample in progress), default=0)
    steady = [
        place
        for place, sample in enumerate(progress)
        if sample.has_finished and sample.num_waiting > 0 and sample.num_running >= full
    ]
    if not steady:
        raise NoSteadyState("no request was still waiting once the first had finished: give more requests")
    first, last = progress[steady[0]], progress[steady[-1]]
    window = MeasurementWindow(
        start_s=first.time_s,
        stop_s=last.time_s,
        num_iterations=steady[-1] - steady[0],
        num_tokens=last.num_tokens - first.num_tokens,
    )
    if window.num_iterations < MIN_ITERATIONS:
        raise NoSteadyState(f"it lasted {window.num_iterations} iterations, fewer than {MIN_ITERATIONS}")
    if window.duration_s < MIN_SHARE_OF_RUN * duration_s:
        raise NoSteadyState(f"it lasted {window.duration_s:.2f} s of {duration_s:.2f} s, too small a part")
    return window


def steady_state(window: MeasurementWindow, energy: EnergySampler) -> SteadyState:
    """Tokens/s and energy in a window; no energy for a window under two seconds, too short for the card's counter."""
    energy_j = energy.used_j(window.start_s, window.stop_s) if window.duration_s >= MIN_ENERGY_S else None
    return SteadyState(
        duration_s=window.duration_s,
        num_iterations=window.num_iterations,
        total_tokens_per_s=window.num_tokens / window.duration_s,
        energy_per_token_j=None if energy_j is None else energy_j / window.num_tokens,
    )
