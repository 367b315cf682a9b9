"""Predicts what the order of a batch's lines is worth: arrival order against that of `nanoflow batch`, simulated.

Two kinds of requests, long prompts with short completions and short prompts with long completions, come in one of three
orders: one kind after the other (as files that are put together come), or at random. Each is run as it comes and in the
order that `batch_files/order.py` finds within the look-ahead; the scheduler is the engine's, iterations take what the
profile says. From the root of the repository:

    python -m benchmarks.predictions.batch_order --profile benchmarks/results/profile_llama-3-8b_h200.json

Without --profile, --model and --estimate name a model and GPUs whose profile is estimated from data sheets.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.document import write_document
from nanoflow.batch_files.order import RequestCost, order_requests
from nanoflow.cli.options import CommandParser
from nanoflow.cli.simulate_runs import model_of
from nanoflow.cost.model import costed_model
from nanoflow.cost.requests import request_cost
from nanoflow.hardware import parse_gpus
from nanoflow.models.config_json import parse
from nanoflow.models.presets import PRESETS
from nanoflow.plan.book import load_book
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import Profile
from nanoflow.simulate.serving import Cluster, SimulatedRun, limits_for, simulate
from nanoflow.workload import Lengths, kinds_of

ARRIVALS = ("prompts first", "completions first", "shuffled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arrival order: tokens/s of prompts and completions as they come, and ordered; gain is their ratio."""

    mix: str
    arrival: str
    look_ahead: int
    arrival_tokens_per_s: float
    ordered_tokens_per_s: float
    gain: float
    num_preemptions: tuple[int, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each mix and arrival order, and write the record."""
    parser = CommandParser(prog="python -m benchmarks.predictions.batch_order", description=__doc__)
    parser.add_argument("--profile", type=Path, help="a measured profile")
    parser.add_argument("--model", default="llama-3-70b", help="preset to estimate a profile for (llama-3-70b)")
    parser.add_argument("--estimate", default="h200x4", metavar="GPUS", help="on these GPUs (h200x4)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="plan book; every batch is sequential if not given")
    parser.add_argument(
        "--mixes",
        nargs="+",
        default=["8000/100x300,200/1000x2400"],
        metavar="IN/OUTxREQUESTS,IN/OUTxREQUESTS",
        help="kinds of requests, and how many (8000/100x300,200/1000x2400)",
    )
    parser.add_argument("--arrivals", nargs="+", default=ARRIVALS, choices=ARRIVALS, help="orders of arrival (all)")
    parser.add_argument("--look-ahead", type=int, default=10_000, help="lines among which the order is chosen (10000)")
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="token budget (2048)")
    parser.add_argument("--max-num-seqs", type=int, default=1024, help="requests that run at once (1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the random order (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args(argv)
    profile = Profile.load(args.profile) if args.profile else _estimated(args.model, args.estimate)
    book = None if args.plan is None else load_book(args.plan)
    model = model_of(profile, book, args.max_batch_tokens)
    gpus = parse_gpus(f"{profile.setup.gpu}x{profile.setup.num_gpus}" if args.profile else args.estimate)
    cost = request_cost(costed_model(parse(profile.config, origin=profile.model)), gpus.sustained_rates())
    rows = list[Row]()
    print(f"{profile.model} on {profile.setup.num_gpus} x {profile.setup.gpu}")
    for mix in args.mixes:
        for arrival in args.arrivals:
            lengths = arrived(mix, arrival, args.seed)
            limits = limits_for(
                profile,
                model.graph,
                lengths,
                max_batch_tokens=args.max_batch_tokens,
                max_num_seqs=args.max_num_seqs,
                gpu_memory_utilization=0.9,
            )
            cluster = Cluster(limits=limits, iterations=model, num_replicas=1, gpus_per_replica=profile.setup.num_gpus)
            runs = [_run(cluster, each) for each in (lengths, ordered(lengths, cost, args.look_ahead))]
            rows.append(_row(mix, arrival, args.look_ahead, runs))
            print(_text(rows[-1]), flush=True)
    if args.json is not None:
        write_document(
            args.json,
            "batch_order",
            model=profile.model,
            gpu=profile.setup.gpu,
            num_gpus=profile.setup.num_gpus,
            is_measured=args.profile is not None,
            plan=None if args.plan is None else args.plan.name,
            max_batch_tokens=args.max_batch_tokens,
            max_num_seqs=args.max_num_seqs,
            rows=[dataclasses.asdict(row) for row in rows],
        )
    return 0


def arrived(mix: str, arrival: str, seed: int) -> list[Lengths]:
    """The requests of a mix in an order of arrival; the first kind are the long prompts."""
    lengths = kinds_of(mix)
    if arrival == "completions first":
        lengths.reverse()
    if arrival == "shuffled":
        random.Random(seed).shuffle(lengths)
    return lengths


def ordered(lengths: Sequence[Lengths], cost: RequestCost, look_ahead: int) -> list[Lengths]:
    """As `nanoflow batch` sends them: the best order within each look-ahead, without common prefixes."""
    found = list[Lengths]()
    for start in range(0, len(lengths), look_ahead):
        block = lengths[start : start + look_ahead]
        found += [block[place] for place in order_requests(block, [b""] * len(block), cost)]
    return found


def _estimated(model: str, gpus: str) -> Profile:
    return estimated_profile(f"preset:{model}", PRESETS[model], parse_gpus(gpus))


def _run(cluster: Cluster, lengths: Sequence[Lengths]) -> SimulatedRun:
    return simulate(cluster, lengths, [0.0] * len(lengths))


def _row(mix: str, arrival: str, look_ahead: int, runs: Sequence[SimulatedRun]) -> Row:
    came, ordered_run = runs
    return Row(
        mix=mix,
        arrival=arrival,
        look_ahead=look_ahead,
        arrival_tokens_per_s=round(came.metrics.total_tokens_per_s, 1),
        ordered_tokens_per_s=round(ordered_run.metrics.total_tokens_per_s, 1),
        gain=round(ordered_run.metrics.total_tokens_per_s / came.metrics.total_tokens_per_s, 4),
        num_preemptions=(came.num_preemptions, ordered_run.num_preemptions),
    )


def _text(row: Row) -> str:
    return (
        f"{row.mix}, {row.arrival}: {row.arrival_tokens_per_s:,.0f} tokens/s as they come, "
        f"{row.ordered_tokens_per_s:,.0f} ordered: {row.gain:.3f}x; preemptions {row.num_preemptions}"
    )


if __name__ == "__main__":
    sys.exit(main())
