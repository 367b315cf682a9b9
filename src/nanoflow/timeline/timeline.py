"""A timeline: which nano-operation ran, or is predicted to run, when and on which lane. What `drawing.py` draws.

Predicted ones come from `simulate/layer.py`, measured ones from a profiler's trace; neither is known here.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.graph.operation import Resource


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One nano-operation in time.

    Attributes:
        operation: Name in the graph, or of a kernel that belongs to none.
        layer: Counted from 0 within the timeline.
        start_token, stop_token: Its nano-batch.
        lane: Name of the lane.
        resource: What bounds it; None if that is not known.
        share: The lane's R.
        start_s, stop_s: From the beginning of the timeline.
    """

    operation: str
    layer: int
    start_token: int
    stop_token: int
    lane: str
    resource: Resource | None
    share: float
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Spans in order of their start.

    Attributes:
        name: For people: the plan's name, and whether it is predicted or measured.
        spans: At least one.
        period_s: Steady-state makespan of one layer; None if nothing is timed: spans then count tokens (`drawing.py`).
    """

    name: str
    spans: tuple[Span, ...]
    period_s: float | None = None

    @property
    def duration_s(self) -> float:
        """From the beginning of the timeline to the last end."""
        return max(span.stop_s for span in self.spans)

    @property
    def lanes(self) -> tuple[str, ...]:
        """Names of the lanes, in order of their first span."""
        return tuple(dict.fromkeys(span.lane for span in self.spans))
