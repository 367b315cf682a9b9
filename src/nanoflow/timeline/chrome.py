"""Timelines in Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each timeline is a process, each lane a thread, each span a complete event. `drawing_svg.py` and `drawing_text.py` draw
the same timelines; `trace.py` reads a profiler's traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from nanoflow.timeline.timeline import Span, Timeline


def chrome_trace(timelines: Sequence[Timeline]) -> bytes:
    """The JSON document of some timelines; times are in microseconds from the beginning of each.

    In a timeline without times (`Timeline.period_s` is None) a token is shown as a second.
    """
    events = [event for place, timeline in enumerate(timelines) for event in _events(place, timeline)]
    return msgspec.json.encode({"displayTimeUnit": "ns", "traceEvents": events})


def _events(process: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    threads = {lane: thread for thread, lane in enumerate(timeline.lanes)}
    yield _name("process_name", timeline.name, pid=process, tid=0)
    for lane, thread in threads.items():
        yield _name("thread_name", lane, pid=process, tid=thread)
    for span in timeline.spans:
        yield {
            "name": span.operation,
            "cat": "unknown" if span.resource is None else span.resource.value,
            "ph": "X",
            "pid": process,
            "tid": threads[span.lane],
            "ts": span.start_s * 1e6,
            "dur": (span.stop_s - span.start_s) * 1e6,
            "args": _details(span),
        }


def _name(kind: str, name: str, **place: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", **place, "args": {"name": name}}


def _details(span: Span) -> dict[str, Any]:
    """The fields that a viewer shows for a selected span."""
    return {"layer": span.layer, "tokens": f"{span.start_token}:{span.stop_token}", "share": span.share}
