"""The soak says what grew, and what was left."""

from __future__ import annotations

from benchmarks.robustness.soak import Course, growth_of

from nanoflow.bench.processes import ProcessState

_MIB = 2**20


def state(role: str, mib: int) -> ProcessState:
    """A process of so much memory."""
    return ProcessState(
        pid=1, role=role, rss_bytes=mib * _MIB, peak_rss_bytes=0, peak_virtual_bytes=0, num_threads=1, num_files=1
    )


def test_growth_counts_from_the_end_of_the_warm_up() -> None:
    course = Course()
    for place, mib in enumerate((100, 300, 500, 500, 502, 540, 560, 600, 600)):
        course.samples.append((place * 10.0, [state("engine", mib), state("template", 50), state("template", 50)]))
    found = growth_of(course, 20.0)
    assert found["engine"] == {"begin_mib": 500.0, "end_mib": 600.0, "peak_mib": 600.0, "growth": 600 / 500 - 1}
    assert found["template"]["end_mib"] == 50.0 and found["template"]["growth"] == 0.0
