"""Lanes at work side by side for a window of time: how often each works so that all end together, and what it takes.

The work of a lane is captured there as a CUDA graph and replayed back to back for the whole window. A lane that ended
early would leave the device to the others, and all would look faster than side by side. So the counts are corrected in
a few rounds, until all lanes end at about the same time. The first, shorter round lets power and clocks settle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nanoflow.device.energy import energy_of
from nanoflow.executor.streams import LaneStream
from nanoflow.profiler.sustained import Span, Work

# Lanes end together if the last one takes at most this part longer than the first; so many rounds are tried.
_BALANCED, _MAX_ROUNDS = 0.02, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRun:
    """Work captured on a lane.

    Attributes:
        stream: The lane's.
        replay: Queues the work once, on the current stream.
        work: What was captured; it keeps the tensors that the graph reads.
    """

    stream: torch.cuda.Stream
    replay: Callable[[], None]
    work: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What lanes did in a window.

    Attributes:
        lanes_s: From the start to the end of each lane's own work.
        energy_j: The device's, until the last lane ended; None if it has no counter.
    """

    lanes_s: tuple[float, ...]
    energy_j: float | None


def balanced_counts(counts: Sequence[int], lanes_s: Sequence[float], window_s: float) -> tuple[int, ...]:
    """How often each lane shall work to be done at about the same time, after `window_s`; at least once."""
    return tuple(max(1, math.ceil(window_s * count / lane_s)) for count, lane_s in zip(counts, lanes_s, strict=True))


def queue_order(counts: Sequence[int]) -> list[int]:
    """Lanes in the order in which their work is queued, so that all start and stay fed: by the part that is queued."""
    turns = [((turn + 0.5) / count, lane) for lane, count in enumerate(counts) for turn in range(count)]
    return [lane for _, lane in sorted(turns)]


def run_window(runs: Sequence[LaneRun], counts: Sequence[int], device: torch.device) -> Window:
    """Run each lane's work so many times, all lanes at once; afterwards the device is idle."""
    torch.cuda.synchronize(device)
    with energy_of(device) as energy:
        gate = _event()
        gate.record(torch.cuda.current_stream(device))
        stops = [_event() for _ in runs]
        for run in runs:
            run.stream.wait_event(gate)
        for lane in queue_order(counts):
            with torch.cuda.stream(runs[lane].stream):
                runs[lane].replay()
        for run, stop in zip(runs, stops, strict=True):
            stop.record(run.stream)
        # Streams of another context: waiting for the device would not wait for them.
        for stop in stops:
            stop.synchronize()
        used_j = energy.used_so_far_j()
    return Window(lanes_s=tuple(gate.elapsed_time(stop) / 1e3 for stop in stops), energy_j=used_j)


def balanced_window(
    runs: Sequence[LaneRun], alone_s: Sequence[float], device: torch.device, span: Span
) -> tuple[tuple[int, ...], Window]:
    """How often each lane worked in a window at whose end all lanes end together, and the window."""
    counts = balanced_counts([1] * len(runs), [2 * time_s for time_s in alone_s], span.settle_s)
    window = run_window(runs, counts, device)
    for _ in range(_MAX_ROUNDS):
        counts = balanced_counts(counts, window.lanes_s, span.measure_s)
        window = run_window(runs, counts, device)
        if max(window.lanes_s) <= min(window.lanes_s) * (1.0 + _BALANCED):
            break
    return counts, window


@contextmanager
def captured_on(lane: LaneStream, work: Work, device: torch.device) -> Iterator[LaneRun]:
    """Work as a CUDA graph captured on a lane; the graph is gone at the end, before the SMs that it was captured on."""
    # What the host prepared for it is queued on the current stream and must be there before.
    torch.cuda.synchronize(device)
    with torch.cuda.stream(lane.stream):
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=lane.stream):
        work()
    try:
        yield LaneRun(stream=lane.stream, replay=graph.replay, work=work)
    finally:
        lane.stream.synchronize()
        graph.reset()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
