"""The steady state of a run: its rate and energy with ramp-up and drain left out.

`ProgressRecorder` notes every iteration as it ends, while `device/energy.py` watches the card's counter; `find_window`
says from when to when the state was steady. Who runs the requests: `offline.py`.
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
    """The end of one iteration: when, tokens of all iterations so far, and the engine's queues then."""

    time_s: float
    num_tokens: int
    num_running: int
    num_waiting: int
    has_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Part of a run between the ends of two iterations; times in seconds of the recorder's clock."""

    start_s: float
    stop_s: float
    num_iterations: int
    num_tokens: int

    @property
    def duration_s(self) -> float:
        """Length."""
        return self.stop_s - self.start_s


class NoSteadyState(Exception):
    """A run has no steady state; the message says why."""


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
        """Of no interest."""

    def observe_tokens(self, num_tokens: int) -> None:
        """Of no interest."""

    def observe_next_tokens(self, latencies_s: Sequence[float]) -> None:
        """Of no interest."""

    def observe_finished(self, request: FinishedRequest) -> None:
        """From now on requests leave as well as come."""
        self._has_finished = True


def find_window(progress: Sequence[Progress], duration_s: float) -> Window:
    """The steady part of a run that took so long.

    It begins with the first iteration after a request has finished that ran at least 90 % of the largest number of
    requests ever running, and ends with the last such iteration after which requests were still waiting: in between,
    requests come as others leave.

    Raises:
        NoSteadyState: There is no such part, or it has fewer than 20 iterations or less than a tenth of the run.
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
    window = Window(
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


def steady_state(window: Window, energy: EnergySampler) -> SteadyState:
    """The figures of a window."""
    energy_j = energy.used_j(window.start_s, window.stop_s) if window.duration_s >= MIN_ENERGY_S else None
    return SteadyState(
        duration_s=window.duration_s,
        num_iterations=window.num_iterations,
        total_tokens_per_s=window.num_tokens / window.duration_s,
        energy_per_token_j=None if energy_j is None else energy_j / window.num_tokens,
    )
