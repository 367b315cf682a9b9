"""How benchmarks name workloads: IN/OUT or trace:FILE.csv, each with a number of requests.

`MEASUREMENT` has the other options of a run, as command-line flags.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow.bench.options import ThroughputConfig
from nanoflow.cli.options import OptionGroup
from nanoflow.config import ConfigError

MEASUREMENT = OptionGroup(
    kind=ThroughputConfig,
    title="measurement",
    skip=frozenset(
        {"workload", "num_requests", "repeats", "json", "goodput", "bounds", "random_weights", "allow_dirty"}
    ),
    defaults={"num_warmup": 32},
)


def read_workloads(args: argparse.Namespace, measurement: OptionGroup[ThroughputConfig]) -> list[ThroughputConfig]:
    """The options of a run for each entry WORKLOAD:N of `--workloads`.

    Raises:
        ConfigError: An entry has no number of requests, or an option is invalid.
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
    """Whether the lengths of its requests are drawn from a file."""
    return workload.startswith("trace:")


def file_name(workload: str) -> str:
    """The workload as a part of a file's name."""
    if is_trace(workload):
        return Path(workload.removeprefix("trace:")).stem
    return workload.replace("/", "-").replace(",", "_")
