"""Metrics of interactive and of background requests apart, one series each: the label `priority` names the class.

The engine counts (`engine/messages.py`); `metrics.py` has all other metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanoflow.engine.messages import ClassCounts
from nanoflow.priorities import PRIORITY_CLASSES
from nanoflow.server.counters import Floats

# Field of `ClassCounts`, name of the metric, and what it counts.
_GAUGES = (
    ("num_running", "num_requests_running_by_priority", "Requests of a class that hold KV pages"),
    ("num_waiting", "num_requests_waiting_by_priority", "Requests of a class that wait for admission"),
)
_COUNTERS = (
    ("num_tokens", "tokens_by_priority", "Tokens of prompts and completions computed for a class, also again"),
    ("num_preemptions", "num_preemptions_by_priority", "Times KV pages were taken back from a request of a class"),
)


def class_families(
    read: Callable[[], Mapping[str, ClassCounts]], *, name: Callable[[str], str], labels: Mapping[str, str]
) -> list[Callable[[Floats], Metric]]:
    """What makes each family of series, in the form that `ServerMetrics` keeps.

    Args:
        read: The counts of the classes now.
        name: The full name of a metric.
        labels: Labels of each series.
    """

    def of_each(kind: type[CounterMetricFamily | GaugeMetricFamily], field: str, short: str, text: str) -> Metric:
        family = kind(name(short), text, labels=(*labels, "priority"))
        classes = read()
        for each in PRIORITY_CLASSES:
            family.add_metric([*labels.values(), each], getattr(classes.get(each, ClassCounts()), field))
        return family

    return [
        *(lambda _, entry=entry: of_each(GaugeMetricFamily, *entry) for entry in _GAUGES),
        *(lambda _, entry=entry: of_each(CounterMetricFamily, *entry) for entry in _COUNTERS),
    ]
