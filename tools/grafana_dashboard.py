"""Write deploy/grafana/nanoflow.json, the dashboard for Grafana. `python -m tools.grafana_dashboard`.

Its panels are in the table below, with the expressions that each draws. `{M}` in an expression stands for the labels
that the reader has chosen. A test compares the file with this table, and the names with what the server counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parent.parent / "deploy/grafana/nanoflow.json"
_CHOSEN = 'model_name=~"$model", instance=~"$instance"'
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_WIDTH, _HEIGHT = 8, 8  # of 24 columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A diagram over time.

    Attributes:
        title, about: Its heading, and what a reader must know of it.
        unit: Grafana's name of the unit.
        lines: Expressions by the name of their line; `{{label}}` in a name stands for a label's value.
    """

    title: str
    about: str
    unit: str
    lines: Mapping[str, str]


def quantiles(name: str, *parts: float) -> dict[str, str]:
    """Lines of quantiles of a histogram over the last interval."""
    rates = f"sum by (le) (rate(nanoflow:{name}_bucket{{M}}[$__rate_interval]))"
    return {f"{part:.0%}": f"histogram_quantile({part:g}, {rates})" for part in parts}


def rate(name: str, by: str = "") -> str:
    """Increase of a counter a second, summed over servers, for each value of a label if one is named."""
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate(nanoflow:{name}{{M}}[$__rate_interval]))"


def share(part: str, whole: str, by: str = "") -> str:
    """Quotient of the rates of two counters."""
    return f"{rate(part, by)} / {rate(whole, by)}"


ROWS: Mapping[str, Sequence[Panel]] = {
    "Load": (
        Panel(
            title="Tokens a second",
            about="Computed prompt tokens count when a request gets its first token.",
            unit="short",
            lines={"generated": rate("generation_tokens_total"), "prompts": rate("prompt_tokens_total")},
        ),
        Panel(
            title="Requests",
            about="Running requests hold KV pages; waiting ones wait for admission.",
            unit="short",
            lines={
                "running": "sum (nanoflow:num_requests_running{M})",
                "waiting": "sum (nanoflow:num_requests_waiting{M})",
            },
        ),
        Panel(
            title="Requests that ended, a second",
            about="By the reason of the completion that ended last.",
            unit="reqps",
            lines={"{{finished_reason}}": rate("request_success_total", "finished_reason")},
        ),
    ),
    "Latency": (
        Panel(
            title="Time to first token",
            about="Arrival to first token.",
            unit="s",
            lines=quantiles("time_to_first_token_seconds", 0.5, 0.95, 0.99),
        ),
        Panel(
            title="Gap between tokens",
            about="Inter-token latency.",
            unit="s",
            lines=quantiles("inter_token_latency_seconds", 0.5, 0.95, 0.99),
        ),
        Panel(
            title="Whole requests",
            about="Arrival to end.",
            unit="s",
            lines=quantiles("e2e_request_latency_seconds", 0.5, 0.95, 0.99),
        ),
        Panel(
            title="Parts of a request, 95 %",
            about="Arrival to admission, admission to first token, first to last token.",
            unit="s",
            lines={
                part: quantiles(f"request_{part}_time_seconds", 0.95)["95%"] for part in ("queue", "prefill", "decode")
            },
        ),
        Panel(
            title="Iterations",
            about="Mean time of an iteration; a high one with few tokens means a slow plan or a slow device.",
            unit="s",
            lines={"mean time": share("engine_iteration_seconds_total", "engine_iterations_total")},
        ),
        Panel(
            title="Tokens of an iteration",
            about="Mean number of prompt tokens computed and tokens generated.",
            unit="short",
            lines={"mean": share("iteration_tokens_total_sum", "iteration_tokens_total_count")},
        ),
    ),
    "KV cache": (
        Panel(
            title="Pages in use",
            about="Part of the device's KV pages that requests hold. Near 1, requests are preempted or wait.",
            unit="percentunit",
            lines={"{{instance}}": "nanoflow:kv_cache_usage_perc{M}"},
        ),
        Panel(
            title="Prompt tokens found",
            about="Tokens found in cached pages / tokens looked for, in each tier.",
            unit="percentunit",
            lines={
                "device, host or disk": share("prefix_cache_hits_total", "prefix_cache_queries_total"),
                "{{tier}}": share("kv_tier_hits_total", "kv_tier_queries_total", "tier"),
            },
        ),
        Panel(
            title="Preemptions a second",
            about="Requests whose pages were taken back; they compute their tokens again.",
            unit="short",
            lines={"preemptions": rate("num_preemptions_total")},
        ),
        Panel(
            title="Memory of the tiers",
            about="Used and whole.",
            unit="bytes",
            lines={
                "{{tier}}, used": "sum by (tier) (nanoflow:kv_tier_used_bytes{M})",
                "{{tier}}, whole": "sum by (tier) (nanoflow:kv_tier_capacity_bytes{M})",
            },
        ),
        Panel(
            title="Copies between tiers",
            about="Bytes a second to a slower tier (stored) and back (loaded).",
            unit="Bps",
            lines={
                "{{tier}}, stored": rate("kv_tier_stored_bytes_total", "tier"),
                "{{tier}}, loaded": rate("kv_tier_loaded_bytes_total", "tier"),
            },
        ),
        Panel(
            title="Evictions a second",
            about="Pages whose memory was needed; lost ones had not been copied to the next tier yet.",
            unit="short",
            lines={
                "{{tier}}": rate("kv_tier_evictions_total", "tier"),
                "{{tier}}, lost": rate("kv_tier_losses_total", "tier"),
            },
        ),
    ),
    "Plans and drafts": (
        Panel(
            title="Iterations a second by plan",
            about="The sequential plan runs what no entry of the plan book fits.",
            unit="short",
            lines={"{{plan}}": rate("iterations_total", "plan")},
        ),
        Panel(
            title="Time with an iteration running",
            about="Part of the time in which the engine had a batch on the device.",
            unit="percentunit",
            lines={"{{instance}}": "rate(nanoflow:engine_iteration_seconds_total{M}[$__rate_interval])"},
        ),
        Panel(
            title="Drafted tokens that were right",
            about="Of speculative decoding.",
            unit="percentunit",
            lines={
                "accepted": share("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total"),
            },
        ),
    ),
}


def panels() -> Iterator[dict[str, Any]]:
    """The rows and panels as Grafana has them, placed from left to right and from top to bottom."""
    number, top = 1, 0
    for title, row in ROWS.items():
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _at(0, top, 24, 1),
        }
        number, top = number + 1, top + 1
        for place, panel in enumerate(row):
            yield _panel(panel, number, _at(place * _WIDTH % 24, top + place * _WIDTH // 24 * _HEIGHT, _WIDTH, _HEIGHT))
            number += 1
        top += -(-len(row) * _WIDTH // 24) * _HEIGHT


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + at),
            "datasource": _SOURCE,
            "expr": line.replace("{M}", f"{{{_CHOSEN}}}"),
            "legendFormat": name,
        }
        for at, (name, line) in enumerate(panel.lines.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _variable(name: str, label: str) -> dict[str, Any]:
    query = f"label_values(nanoflow:num_requests_running, {label})"
    return {
        "name": name,
        "type": "query",
        "label": name.capitalize(),
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    source = {"name": "source", "type": "datasource", "label": "Prometheus", "query": "prometheus"}
    return {
        "title": "nanoflow",
        "uid": "nanoflow",
        "tags": ["nanoflow", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-30m", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [source, _variable("model", "model_name"), _variable("instance", "instance")]},
        "panels": list(panels()),
    }


def main() -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    DASHBOARD.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
