"""A timeline: which nano-operation ran, or is predicted to run, when and on which lane.

`simulate/layer.py` predicts timelines, `trace.py` reads measured ones, `drawing.py` prepares pictures of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanoflow.graph.operation import Resource


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One nano-operation in time.

    Attributes:
        operation: Name in the graph, or name of a kernel that belongs to no operation.
        layer: Counted from 0 within the timeline.
        start_token, stop_token: The token range of its nano-batch.
        lane: Name of the lane.
        resource: What bounds it; None if unknown.
        share: The lane's share R.
        start_s, stop_s: Seconds from the beginning of the timeline.
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
        name: Title for people: the plan's name, and whether it is predicted or measured.
        spans: At least one.
        period_s: Steady-state makespan of one layer; None if there are no times and spans count tokens (`drawing.py`).
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


COPY_LANE = "copies"
"""The lane of copies of KV pages to host memory."""


def with_copies(timeline: Timeline, copy_s: float, num_tokens: int) -> Timeline:
    """The timeline with copies beside its layers: one after the other, the one of a layer not before the layer begins.

    Args:
        timeline: Predicted.
        copy_s: Seconds of the copies of a layer; nothing is added if there are none.
        num_tokens: Of the batch.
    """
    if copy_s <= 0:
        return timeline
    begins_s: dict[int, float] = {}
    for span in timeline.spans:
        begins_s[span.layer] = min(span.start_s, begins_s.get(span.layer, span.start_s))
    copies, free_at_s = [], 0.0
    for layer, begin_s in sorted(begins_s.items()):
        start_s = max(begin_s, free_at_s)
        free_at_s = start_s + copy_s
        copies.append(
            Span(
                operation="save_pages",
                layer=layer,
                start_token=0,
                stop_token=num_tokens,
                lane=COPY_LANE,
                resource=None,
                share=0.0,
                start_s=start_s,
                stop_s=free_at_s,
            )
        )
    spans = sorted((*timeline.spans, *copies), key=lambda span: span.start_s)
    return replace(timeline, spans=tuple(spans))
