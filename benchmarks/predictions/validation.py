"""The simulator against measured runs: every throughput record of a model, simulated from a profile of the same card.

    python -m benchmarks.predictions.validation --profile benchmarks/results/profile_llama-3-8b_h200.json \\
        --records benchmarks/results/throughput_llama-3-8b_*.json --traces FOLDER

A record of a trace needs the trace's file in FOLDER, and is skipped without it. Exit status 1 if an error is above
`--most`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.cli.options import CommandParser
from nanoflow.profile.table import Profile
from nanoflow.simulate.iteration import IterationModel
from nanoflow.simulate.serving import Cluster, SimulatedRun, limits_for, simulate
from nanoflow.workload import draw_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A workload, measured and simulated: tokens/s, and joules a token (None if unknown)."""

    workload: str
    measured: float
    simulated: float
    measured_j: float | None
    simulated_j: float | None

    @property
    def error(self) -> float:
        """Relative error of the simulated rate."""
        return self.simulated / self.measured - 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each record."""
    parser = CommandParser(prog="python -m benchmarks.predictions.validation", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--records", type=Path, nargs="+", required=True)
    parser.add_argument("--traces", type=Path, help="folder with the trace files of records")
    parser.add_argument("--most", type=float, default=0.07, help="largest error, as a part")
    args = parser.parse_args(argv)
    worst = 0.0
    print(f"{'workload':<28}{'measured':>10}{'simulated':>11}{'error':>8}{'mJ':>8}{'simulated':>11}")
    for row in compare(Profile.load(args.profile), args.records, args.traces):
        energies = "".join(
            f"{'-' if joules is None else f'{joules * 1e3:.1f}':>{width}}"
            for joules, width in ((row.measured_j, 8), (row.simulated_j, 11))
        )
        print(
            f"{row.workload:<28}{row.measured:>10,.0f}{row.simulated:>11,.0f}{row.error:>+8.1%}{energies}", flush=True
        )
        worst = max(worst, abs(row.error))
    return 1 if worst > args.most else 0


def compare(profile: Profile, records: Sequence[Path], traces: Path | None) -> Iterator[Comparison]:
    """Compare each record that can be simulated."""
    model = IterationModel(profile)
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        workload = str(record["workload"]["workload"])
        if workload.startswith("trace:"):
            if traces is None or not (traces / workload.removeprefix("trace:")).is_file():
                continue
            lengths_from = f"trace:{traces / workload.removeprefix('trace:')}"
        else:
            lengths_from = workload
        run = simulated(profile, model, record, lengths_from).metrics
        yield Comparison(
            workload=workload,
            measured=_mean(record, "total_tokens_per_s") or 0.0,
            simulated=run.total_tokens_per_s,
            measured_j=_mean(record, "energy_per_token_j"),
            simulated_j=run.energy_per_token_j,
        )


def simulated(profile: Profile, model: IterationModel, record: dict[str, Any], workload: str) -> SimulatedRun:
    """Simulate the run of a record with its own options."""
    options, asked = record["config"], record["workload"]
    lengths = draw_lengths(workload, asked["num_requests"], asked["seed"])
    limits = limits_for(
        profile,
        model.graph,
        lengths,
        max_batch_tokens=options["max_batch_tokens"],
        max_num_seqs=options["max_num_seqs"],
        gpu_memory_utilization=options["gpu_memory_utilization"],
    )
    cluster = Cluster(
        limits=limits, iterations=model, num_replicas=1, static_power_w=profile.setup.static_power_w or 0.0
    )
    return simulate(cluster, lengths, [0.0] * len(lengths))


def _mean(record: dict[str, Any], name: str) -> float | None:
    values = [run[name] for run in record["repeats"]]
    return None if None in values else statistics.fmean(values)


if __name__ == "__main__":
    sys.exit(main())
