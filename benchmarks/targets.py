"""Several workloads on one model that is loaded once: a record each, as `nanoflow bench throughput` writes it.

What was possible is measured for all of them before the engine is built. A line is printed as soon as a workload is
done; exit status 1 if a request failed. From the root of the repository:

    python -m benchmarks.targets --model preset:llama-3-8b --max-num-seqs 1024 \\
        --workloads 512/512:1100 trace:lengths.csv:2500 --json-folder benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoflow.bench.config import ThroughputConfig
from nanoflow.bench.metrics import RunMetrics
from nanoflow.bench.offline import run_workloads
from nanoflow.bench.provenance import require_clean
from nanoflow.bench.record import BenchRecord, write_record
from nanoflow.bench.steady import SteadyState
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import UNWATCHED_DEFAULTS, ConfigError, EngineConfig
from nanoflow.models.presets import preset_name

_MEASUREMENT = OptionGroup(
    kind=ThroughputConfig, title="measurement", skip=frozenset({"workload", "num_requests", "json"})
)
_ENGINE = OptionGroup(
    kind=EngineConfig, title="model and engine", skip=frozenset({"seed"}), defaults=UNWATCHED_DEFAULTS
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every workload, print its line and write its record."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        engine_config = _ENGINE.read(args)
        configs = read_workloads(args)
        paths = record_paths(args.json_folder, engine_config.model, [config.workload for config in configs])
        require_clean(paths[0], allows_dirty=configs[0].allow_dirty)
    except ConfigError as error:
        parser.error(str(error))
    num_failed = 0
    for record, path in zip(run_workloads(engine_config, configs), paths, strict=True):
        print(summary(record), flush=True)
        write_record(record, path)
        num_failed += sum(run.num_failed for run in record.repeats)
    return 1 if num_failed else 0


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument(
        "--workloads",
        nargs="+",
        required=True,
        metavar="WORKLOAD:N",
        help="IN/OUT or trace:FILE.csv, each with its number of requests in one repeat",
    )
    parser.add_argument("--json-folder", type=Path, required=True, metavar="DIR", help="folder for the records")
    _MEASUREMENT.add_to(parser)
    _ENGINE.add_to(parser)
    return parser


def read_workloads(
    args: argparse.Namespace, measurement: OptionGroup[ThroughputConfig] = _MEASUREMENT
) -> list[ThroughputConfig]:
    """The options of every workload; they differ in what `--workloads` says. ConfigError if that is not understood."""
    configs = []
    for text in args.workloads:
        workload, _, count = text.rpartition(":")
        if not count.isdecimal():
            raise ConfigError(f"{text!r} names no number of requests; write {text}:1000")
        configs.append(
            ThroughputConfig(
                **{**measurement.defaults, **measurement.given(args)}, workload=workload, num_requests=int(count)
            ),
        )
    return configs


def record_paths(folder: Path, model: str, workloads: Sequence[str]) -> list[Path]:
    """A file for each workload's record; ConfigError if two would be one."""
    model_name = preset_name(model) or Path(model).name
    names = [Path(workload.removeprefix("trace:")).stem if is_trace(workload) else workload for workload in workloads]
    paths = [folder / f"throughput_{model_name}_{name.replace('/', '-')}.json" for name in names]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise ConfigError(f"two workloads would be written to {path}")
    return paths


def is_trace(workload: str) -> bool:
    return workload.startswith("trace:")


def summary(record: BenchRecord) -> str:
    """One line: the middle one of the repeats, as a whole and in its steady state."""
    run = sorted(record.repeats, key=lambda run: run.total_tokens_per_s)[len(record.repeats) // 2]
    failed = [f"{run.num_failed} FAILED"] if run.num_failed else []
    steady = [f"no steady state: {run.no_steady_reason}"]
    if run.steady is not None:
        steady = [f"steady {', '.join(figures(run.steady))}"]
    workload = record.workload
    return "; ".join(
        [f"{workload.workload} x {workload.num_requests:,}: {', '.join(figures(run))}", *steady, *failed],
    )


def figures(part: RunMetrics | SteadyState) -> Iterator[str]:
    """What is known of rate, energy and share of the serial bound (the sum of parts alone)."""
    yield f"{part.total_tokens_per_s:,.0f} tok/s"
    if part.energy_per_token_j is not None:
        yield f"{part.energy_per_token_j * 1e3:.1f} mJ/token"
    if isinstance(part, RunMetrics) and part.share_of_serial is not None:
        yield f"{part.share_of_serial:.1%} of the serial bound"


if __name__ == "__main__":
    sys.exit(main())
