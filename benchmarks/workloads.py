"""How benchmarks name workloads: IN/OUT or trace:FILE.csv, each with a number of requests."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow.bench.options import ThroughputConfig
from nanoflow.cli.options import OptionGroup
from nanoflow.config import ConfigError


def read_workloads(args: argparse.Namespace, measurement: OptionGroup[ThroughputConfig]) -> list[ThroughputConfig]:
    """The options of every workload; they differ in what `--workloads` says.

    Raises:
        ConfigError: A workload has no number of requests, or an option makes no sense.
    """
    configs = []
    for text in args.workloads:
        workload, _, count = text.rpartition(":")
        if not count.isdecimal():
            raise ConfigError(f"{text!r} names no number of requests; write {text}:1000")
        options = {**measurement.defaults, **measurement.given(args), "bounds": False}
        configs.append(ThroughputConfig(**options, workload=workload, num_requests=int(count)))
    return configs


def is_trace(workload: str) -> bool:
    """Whether its lengths are drawn from a file."""
    return workload.startswith("trace:")


def file_name(workload: str) -> str:
    """The workload as a part of a file's name."""
    return Path(workload.removeprefix("trace:")).stem if is_trace(workload) else workload.replace("/", "-")
