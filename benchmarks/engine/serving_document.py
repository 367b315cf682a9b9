"""Reads the record of `serving.py`: HTTP over in-process, whether all went well, and a line of text for each load."""

from __future__ import annotations

import math
import statistics
from typing import Any


def ratios(document: dict[str, Any]) -> dict[str, float]:
    """HTTP over in-process: ratio of median total tokens/s, for each load all at once that was measured both ways."""
    found = {}
    for load in document["loads"]:
        same = [each for each in document.get("in_process", ()) if _asks_same(each["workload"], load["workload"])]
        if same and load["load"]["request_rate"] == math.inf:
            over_http = statistics.median(run["total_tokens_per_s"] for run in load["repeats"])
            found[load["name"]] = over_http / statistics.median(run["total_tokens_per_s"] for run in same[0]["repeats"])
    return found


def _asks_same(in_process: dict[str, Any], load: dict[str, Any]) -> bool:
    return all(in_process[name] == value for name, value in load.items() if name not in ("json", "repeats"))


def is_good(found: dict[str, Any]) -> bool:
    """Whether no request failed and the server was idle after every load."""
    return all(not run["num_failed"] and not run["left_over"] for run in found["repeats"])


def line(found: dict[str, Any]) -> str:
    """One load as a line of text: its median repeat."""
    repeats = sorted(found["repeats"], key=lambda run: run["total_tokens_per_s"])
    run = repeats[len(repeats) // 2]
    parts = [f"{found['name']}: {run['total_tokens_per_s']:,.0f} tok/s"]
    for label, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("longest gap", "longest_gap_s")):
        if run[key] is not None:
            parts.append(f"{label} p50 {run[key]['p50'] * 1e3:,.1f} p99 {run[key]['p99'] * 1e3:,.1f} ms")
    if run["server_cpu_s_per_output_token"] is not None:
        parts.append(f"server CPU {run['server_cpu_s_per_output_token'] * 1e6:,.1f} us a token")
    parts.append(f"busiest client {run['busiest_client']:.0%}")
    for each in repeats:
        parts += [f"{each['num_failed']} FAILED: {next(iter(each['errors']))}"] if each["num_failed"] else []
        parts += [f"LEFT OVER: {each['left_over']}"] if each["left_over"] else []
    return "; ".join(parts)
