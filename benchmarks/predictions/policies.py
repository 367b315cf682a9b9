"""Policies of the scheduler compared in simulated runs of several workloads, as `nanoflow simulate --policies` does.

KV memory is made scarce, so that the policies matter: with ample memory nobody waits and nobody is sent back. From the
root of the repository, with traces in TRACES:

    python -m benchmarks.predictions.policies --profile benchmarks/results/profile_llama-3-8b_h200.json \\
        --workloads 1024/512:300 trace:TRACES/sharegpt.csv:600 trace:TRACES/lmsys.csv:800 \\
        trace:TRACES/splitwise.csv:300 --rounds trace:TRACES/sharegpt.csv:150 --json policies.json

A workload is WORKLOAD:REQUESTS, all at once; one of --rounds is WORKLOAD:CONVERSATIONS.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.cli.simulate_options import SimulateConfig
from nanoflow.cli.simulate_runs import Simulation
from nanoflow.conversation_options import ConversationConfig
from nanoflow.profile.table import Profile
from nanoflow.simulate.compare import Choice, best, choices, compare, table
from nanoflow.simulate.iteration import IterationModel
from nanoflow.simulate.serving import SimulatedRun

# Rounds of each conversation, and seconds of thinking between them.
_ROUNDS, _THINK_S = 4, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One choice on one workload; `ratio` is tokens/s over those of what an engine does."""

    workload: str
    admission: str
    returns: str
    victim: str
    queue: str
    is_best: bool
    tokens_per_s: float
    ratio: float
    ttft_p50_s: float
    ttft_p99_s: float
    latency_per_token_s: float
    num_preemptions: int
    num_loads: int
    num_computed_share: float


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each workload and one of the ratios, and write the record."""
    parser = CommandParser(prog="python -m benchmarks.predictions.policies", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--workloads", nargs="*", default=[], metavar="WORKLOAD:REQUESTS")
    parser.add_argument("--rounds", nargs="*", default=[], metavar="WORKLOAD:CONVERSATIONS")
    parser.add_argument("--max-tokens", type=int, default=1024, help="most tokens that each request allows")
    parser.add_argument("--kv-host-gib", type=float, default=64.0)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.2)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    model, rows = IterationModel(Profile.load(args.profile)), list[Row]()
    for text, is_rounds in [(text, False) for text in args.workloads] + [(text, True) for text in args.rounds]:
        workload, _, count = text.rpartition(":")
        config = SimulateConfig(
            workload=workload,
            num_requests=1 if is_rounds else int(count),
            max_batch_tokens=2048,
            max_num_seqs=1024,
            max_tokens=args.max_tokens,
            kv_host_gib=args.kv_host_gib,
            gpu_memory_utilization=args.gpu_memory_utilization,
        )
        talk = ConversationConfig(num_conversations=int(count), rounds=_ROUNDS, think_time=_THINK_S)
        simulation = Simulation.make(model.profile, model, config, talk if is_rounds else None)
        begin_s = time.monotonic()
        runs = compare(partial(simulation.run, 1))
        name = f"{workload.rpartition('/')[2] if '/' in workload and ':' in workload else workload}:{count}"
        name = f"{name} conversations" if is_rounds else name
        print(f"{name}, {simulation.limits.num_pages:,} pages, {time.monotonic() - begin_s:.0f} s")
        print("\n".join(table(runs)), flush=True)
        rows += _rows(name, runs)
    print("\n".join(_summary(rows)))
    if args.json is not None:
        write_document(
            args.json,
            "policies",
            model=model.profile.model,
            gpu=model.profile.setup.gpu,
            rows=[dataclasses.asdict(row) for row in rows],
        )
    return 0


def _rows(workload: str, runs: dict[Choice, SimulatedRun]) -> Iterator[Row]:
    base, winner = next(iter(runs.values())).metrics.total_tokens_per_s, best(runs)
    for choice, ran in runs.items():
        metrics, device = ran.metrics, ran.tiers["device"]
        assert metrics.ttft_s is not None and metrics.normalized_latency_s is not None
        yield Row(
            workload=workload,
            **dataclasses.asdict(choice),
            is_best=choice == winner,
            tokens_per_s=metrics.total_tokens_per_s,
            ratio=metrics.total_tokens_per_s / base,
            ttft_p50_s=metrics.ttft_s.p50,
            ttft_p99_s=metrics.ttft_s.p99,
            latency_per_token_s=metrics.normalized_latency_s.mean,
            num_preemptions=ran.num_preemptions,
            num_loads=ran.num_loads,
            num_computed_share=1 - device.hits / max(device.queries, 1),
        )


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table: for each choice the ratio of tokens/s, and preemptions, by workload."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    yield "| admission | return | victim | queue | " + " | ".join(workloads) + " |"
    yield "|---" * (4 + len(workloads)) + "|"
    for choice in choices():
        names = dataclasses.astuple(choice)
        cells = [_cell(row) for row in rows if (row.admission, row.returns, row.victim, row.queue) == names]
        yield "| " + " | ".join([*names, *cells]) + " |"


def _cell(row: Row) -> str:
    ratio = f"**{row.ratio:.3f}**" if row.is_best else f"{row.ratio:.3f}"
    return f"{ratio} ({row.num_preemptions:,})"


if __name__ == "__main__":
    sys.exit(main())
