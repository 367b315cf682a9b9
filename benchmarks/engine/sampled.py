"""The cost of sampling: the same requests with each kind of sampling in turn, on one engine that is loaded once.

All kinds are compared with greedy sampling. From the root of the repository:

    python -m benchmarks.engine.sampled --model preset:llama-3-8b --workloads trace:sharegpt.csv:1000 \\
        --json benchmarks/results/sampled_llama-3-8b.json

Kinds: greedy; temperature (0.8); top_p (temperature 0.8, top_p 0.95); top_k (temperature 0.8, top_k 50); min_p
(temperature 0.8, min_p 0.05); penalties (temperature 0.8, repetition 1.1, presence and frequency 0.5); logprobs
(greedy, 5 log probabilities a token); min_tokens (greedy, 16; the end of sequence is not ignored in this kind, since
otherwise there would be no token to hold back). The record is written after each run. Started again, the command
measures only what the record lacks. Exit status 1 if a run is missing or a request failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.common.in_turn import Run, Setting, add_options, run_in_turn
from benchmarks.common.rungs import read_engine
from benchmarks.common.workloads import MEASUREMENT, read_workloads
from nanoflow.bench.options import SAMPLING, ThroughputConfig
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import ConfigError, EngineConfig

GREEDY = "greedy"
KINDS: Mapping[str, Mapping[str, Any]] = {
    GREEDY: {},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "logprobs": {"logprobs": 5},
    "min_tokens": {"min_tokens": 16},
}

_MEASUREMENT = OptionGroup(
    kind=ThroughputConfig,
    title="measurement",
    skip=MEASUREMENT.skip | frozenset(SAMPLING),
    defaults=MEASUREMENT.defaults,
)
_ENGINE = OptionGroup(
    kind=EngineConfig,
    title="model and engine",
    skip=frozenset({"seed", "load_format"}),
    defaults={"model": "preset:llama-3-8b", "goal": "throughput"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the record lacks, then print and write the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(args.json, allows_dirty=args.allow_dirty)
        return run_in_turn("sampled", read_settings(args), args, is_greedy)
    except ValueError as error:
        parser.error(str(error))


def is_greedy(run: Run) -> bool:
    """Whether a run is the one that others are compared with."""
    return bool(run["asked"]["name"] == GREEDY)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.engine.sampled", description=__doc__)
    parser.add_argument("--workloads", nargs="+", required=True, metavar="WORKLOAD:N", help="with numbers of requests")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help=f"{', '.join(KINDS)} (default: all; greedy always)")
    add_options(parser)
    _MEASUREMENT.add_to(parser)
    _ENGINE.add_to(parser)
    return parser


def read_settings(args: argparse.Namespace) -> list[Setting]:
    """Every kind on every workload; ConfigError if there is no such kind."""
    for kind in args.kinds or ():
        if kind not in KINDS:
            raise ConfigError(f"there is no kind {kind!r}; known: {', '.join(KINDS)}")
    kinds = [kind for kind in KINDS if args.kinds is None or kind in (GREEDY, *args.kinds)]
    engine = read_engine(_ENGINE, args)
    return [
        Setting(name=kind, engine=engine, config=replace(config, **KINDS[kind]))
        for config in read_workloads(args, _MEASUREMENT)
        for kind in kinds
    ]


if __name__ == "__main__":
    sys.exit(main())
