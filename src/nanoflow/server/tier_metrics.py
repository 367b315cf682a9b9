"""Metrics of the tiers of the KV cache, one series each, and their sums by the names that vLLM has for offloading.

The engine counts (`kvcache/tier_counts.py`); `metrics.py` has all other metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanoflow.kvcache.tier_counts import TierCounts, total
from nanoflow.server.counters import Floats

Tiers = Mapping[str, TierCounts]

# Field of `TierCounts`, name of the metric, and what it counts.
_COUNTERS = (
    ("queries", "kv_tier_queries", "Tokens that were looked for in a tier of the KV cache"),
    ("hits", "kv_tier_hits", "Those of them that were found in it"),
    ("stored_bytes", "kv_tier_stored_bytes", "Bytes copied to a tier from a faster one"),
    ("loaded_bytes", "kv_tier_loaded_bytes", "Bytes copied from a tier to a faster one"),
    ("load_seconds", "kv_tier_load_seconds", "Seconds that these copies took"),
    ("evictions", "kv_tier_evictions", "Pages of a tier whose memory was needed for others"),
    ("losses", "kv_tier_losses", "Those of them that the tier below did not have yet: the disk is too slow"),
)
_GAUGES = (
    ("used_bytes", "kv_tier_used_bytes", "Bytes of a tier in use, for cached pages or running requests"),
    ("capacity_bytes", "kv_tier_capacity_bytes", "Bytes of a tier"),
)
# vLLM's names, of all tiers below the device together.
_BELOW_THE_DEVICE = (
    ("queries", "external_prefix_cache_queries", "Tokens that were looked for below the device"),
    ("hits", "external_prefix_cache_hits", "Those of them that were found there"),
    ("stored_bytes", "kv_offload_store_bytes", "Bytes copied to tiers below the device"),
    ("loaded_bytes", "kv_offload_load_bytes", "Bytes copied from tiers below the device"),
    ("load_seconds", "kv_offload_load_time", "Seconds that these copies took"),
)


def tier_families(
    read: Callable[[], Tiers], *, name: Callable[[str], str], labels: Mapping[str, str]
) -> list[Callable[[Floats], Metric]]:
    """What makes each family of series, in the form that `ServerMetrics` keeps.

    Args:
        read: The tiers now.
        name: The full name of a metric.
        labels: Labels of each series.
    """

    def of_each(kind: type[CounterMetricFamily | GaugeMetricFamily], field: str, short: str, text: str) -> Metric:
        family = kind(name(short), text, labels=(*labels, "tier"))
        for tier, counts in read().items():
            family.add_metric([*labels.values(), tier], getattr(counts, field))
        return family

    def below(field: str, short: str, text: str) -> Metric:
        family = CounterMetricFamily(name(short), text, labels=tuple(labels))
        lower = total(counts for tier, counts in read().items() if tier != "device")
        family.add_metric(list(labels.values()), getattr(lower, field))
        return family

    return [
        *(lambda _, entry=entry: of_each(CounterMetricFamily, *entry) for entry in _COUNTERS),
        *(lambda _, entry=entry: of_each(GaugeMetricFamily, *entry) for entry in _GAUGES),
        *(lambda _, entry=entry: below(*entry) for entry in _BELOW_THE_DEVICE),
    ]
