"""Time and energy of work that is repeated until power and clocks have settled: the only figures that plans can use.

A burst flatters a card that is limited by power. What is worked on stands in `site.py`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanoflow.device.energy import energy_of, gpu_clock_mhz

Work = Callable[[], None]
# Parts of the window whose times tell the spread.
_NUM_PARTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """How long to run something, without and then with looking at the clock; seconds."""

    settle_s: float
    measure_s: float


# Some ten ticks of a GPU's energy counter.
SPANS = {"cuda": Span(settle_s=0.4, measure_s=1.0), "cpu": Span(settle_s=0.0, measure_s=0.05)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sustained:
    """One call among many back to back.

    Attributes:
        time_s: Mean over the window.
        energy_j: The device's, by its counter; None if it has none.
        spread: Standard deviation between parts of the window, as a part of the mean.
        clock_mhz: The multiprocessors', read while the work ran; None if unknown.
    """

    time_s: float
    energy_j: float | None
    spread: float
    clock_mhz: float | None


def sustained(work: Work, device: torch.device, span: Span | None = None) -> Sustained:
    """The cost of calling `work` once. On a GPU it is captured as one CUDA graph, so it may not wait for the host."""
    span = span or SPANS[device.type]
    work()
    run = _captured(work, device) if device.type == "cuda" else work
    once_s = _elapsed_s(run, 1, device)
    if span.settle_s:
        num_calls = math.ceil(span.settle_s / once_s)
        once_s = _elapsed_s(run, num_calls, device) / num_calls
    num_calls = math.ceil(span.measure_s / once_s / _NUM_PARTS)
    parts_s = []
    with energy_of(device) as energy:
        for _ in range(_NUM_PARTS):
            parts_s.append(_elapsed_s(run, num_calls, device) / num_calls)
        used_j = energy.used_so_far_j()
    mean_s = statistics.fmean(parts_s)
    return Sustained(
        time_s=mean_s,
        energy_j=None if used_j is None else used_j / (num_calls * _NUM_PARTS),
        spread=statistics.pstdev(parts_s) / mean_s,
        clock_mhz=_clock_mhz(run, device),
    )


def _captured(work: Work, device: torch.device) -> Work:
    """The same work as a CUDA graph, which the host launches at once."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        work()
    return graph.replay


def _elapsed_s(run: Work, num_calls: int, device: torch.device) -> float:
    """Seconds until the device has done all of it; the clock is the host's, so both ends wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    for _ in range(num_calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def _clock_mhz(run: Work, device: torch.device) -> float | None:
    """Read while one more call is under way."""
    if device.type != "cuda":
        return None
    run()
    return gpu_clock_mhz(device)
