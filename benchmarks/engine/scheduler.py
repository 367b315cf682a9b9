"""Time of the scheduler alone: `schedule` and `commit`, without a model, with one batch in flight.

Workloads, measured in the steady state; prompts have 512 tokens unless stated:
  decode  every running request decodes, with about 2,000 tokens of context
  chunk   the same; in every tenth iteration a prefill chunk of a new request fills the token budget
  churn   requests of 512 output tokens arrive and finish, as many as there are rows
  full    the same with a pool of pages so small that the predicted peak delays admission
  short   requests of 64 prompt and 32 to 96 output tokens, unknown in advance: one in 60 finishes in each iteration
  long    every running request decodes; one of them has 120,000 tokens of context

Run it on one core: OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.engine.scheduler --check
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.document import write_document
from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.bench.machine import detect_machine
from nanoflow.cli.options import CommandParser
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Scheduler, SchedulerLimits

# Targets for schedule + commit, for up to 1,000 running requests and for more.
MAX_MEDIAN_S, MAX_MEDIAN_MANY_S = 1e-3, 2e-3
EOS = 2
NUM_WARMUP = 1500
PAGE_SIZE = 16
VOCAB_SIZE = 128_256


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A workload.

    Attributes:
        num_output: Tokens that each request generates.
        num_queued: Requests that always wait.
        newcomer_period: Iterations between new requests of one output token; None for no such requests.
        pool_share: Pages of the pool / pages for all rows at full length.
        num_prompt: Tokens of each prompt.
        min_output: Smallest number of output tokens, if requests end by a token at a length that the scheduler does not
            know; None if it knows the length.
        num_long: Context in tokens of one additional request.
    """

    num_output: int
    num_prompt: int = 512
    min_output: int | None = None
    num_long: int = 0
    num_queued: int = 0
    newcomer_period: int | None = None
    pool_share: float = 1.0


WORKLOADS = {
    "decode": Workload(num_output=7000),
    "chunk": Workload(num_output=7000, newcomer_period=10),
    "churn": Workload(num_output=512, num_queued=16),
    "full": Workload(num_output=512, num_queued=16, pool_share=0.65),
    "short": Workload(num_output=96, num_prompt=64, min_output=32, num_queued=512),
    "long": Workload(num_output=7000, num_long=120_000),
}


class Bench:
    """A scheduler in the steady state of one workload, and the times of its calls."""

    def __init__(self, workload: Workload, *, num_requests: int, max_batch_tokens: int) -> None:
        num_rows = num_requests + (1 if workload.newcomer_period or workload.num_long else 0)
        usual_len = workload.num_prompt + workload.num_output
        max_model_len = max(usual_len, workload.num_long + workload.num_output)
        self._workload = workload
        self._num_chunk = max_batch_tokens - num_requests
        self._random = np.random.default_rng(0)
        self._num_added = 0
        self._in_flight: DenseBatch | None = None
        self.scheduler = Scheduler(
            limits=SchedulerLimits(
                max_batch_tokens=max_batch_tokens,
                max_num_seqs=num_rows,
                max_model_len=max_model_len,
                num_pages=int(num_rows * workload.pool_share * -(-usual_len // PAGE_SIZE)) + max_model_len // PAGE_SIZE,
                page_size=PAGE_SIZE,
                vocab_size=VOCAB_SIZE,
            )
        )
        if workload.num_long:
            self._add(workload.num_long, workload.num_output)
        for _ in range(num_requests):
            self._add(workload.num_prompt, workload.num_output)
        for _ in range(NUM_WARMUP):
            self.step()

    def run(self, num_iterations: int) -> dict[str, float | int]:
        """Run a number of iterations: times in microseconds, and the contents of the batches."""
        times_s, num_tokens, num_preempted = np.zeros((num_iterations, 2)), 0, self.scheduler.num_preemptions
        for iteration in range(num_iterations):
            if self._workload.newcomer_period and iteration % self._workload.newcomer_period == 0:
                self._add(self._num_chunk, 1)
            times_s[iteration] = self.step()
            num_tokens += self._in_flight.num_tokens if self._in_flight else 0
        calls = {"schedule": times_s[:, 0], "commit": times_s[:, 1], "both": times_s.sum(axis=1)}
        return {
            **{f"{call}_median_us": round(float(np.median(values)) * 1e6, 1) for call, values in calls.items()},
            **{f"{call}_p99_us": round(float(np.percentile(values, 99)) * 1e6, 1) for call, values in calls.items()},
            "mean_batch_tokens": num_tokens // num_iterations,
            "num_running": self.scheduler.num_running,
            "num_preemptions": self.scheduler.num_preemptions - num_preempted,
        }

    def step(self) -> tuple[float, float]:
        """Schedule a batch, then commit the one before; seconds of each."""
        for _ in range(self._workload.num_queued - self.scheduler.num_waiting):
            self._add(self._workload.num_prompt, self._workload.num_output)
        start_s = time.perf_counter()
        batch = self.scheduler.schedule()
        schedule_s, commit_s = time.perf_counter() - start_s, 0.0
        if self._in_flight is not None:
            result = self._sample(self._in_flight)
            start_s = time.perf_counter()
            self.scheduler.commit(self._in_flight, result)
            commit_s = time.perf_counter() - start_s
        self._in_flight = batch
        return schedule_s, commit_s

    def _sample(self, batch: DenseBatch) -> SampledTokens:
        """Random tokens; of requests that end by a token, some get the end of sequence."""
        token_ids = self._random.integers(EOS + 1, VOCAB_SIZE, len(batch.sampled), dtype=np.int32)
        workload = self._workload
        if workload.min_output is not None:
            num_generated = batch.context_len[batch.sampled] - workload.num_prompt
            ends = self._random.integers(workload.min_output, workload.num_output, len(token_ids))
            token_ids[(num_generated > workload.min_output) & (ends < workload.min_output + 2)] = EOS
        return SampledTokens(token_ids=token_ids)

    def _add(self, num_prompt: int, num_output: int) -> None:
        request = Request(
            request_id=self._num_added,
            prompt_token_ids=self._random.integers(0, VOCAB_SIZE, num_prompt).tolist(),
            params=SamplingParams(max_tokens=num_output, ignore_eos=self._workload.min_output is None),
            seed=0,
            max_tokens=num_output,
            eos_token_ids=(EOS,),
        )
        self.scheduler.add(request)
        self._num_added += 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="python -m benchmarks.engine.scheduler", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="requests that run at once (1000)")
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="token budget (2048)")
    parser.add_argument("--iterations", type=int, default=1000, help="iterations to time, at most 5000 (1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--check", action="store_true", help="fail if a median is above the target")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.iterations <= 5000 or not 1 <= arguments.requests < arguments.max_batch_tokens:
        parser.error("--iterations must be in 1..5000 and --requests in 1..max_batch_tokens - 1")

    results = {}
    print(f"{'us':8}{'schedule':>18}{'commit':>18}{'both':>18}{'tokens':>8}{'running':>8}{'preempted':>10}")
    print(f"{'':8}" + f"{'median':>10}{'p99':>8}" * 3)
    for name, workload in WORKLOADS.items():
        bench = Bench(workload, num_requests=arguments.requests, max_batch_tokens=arguments.max_batch_tokens)
        row = results[name] = bench.run(arguments.iterations)
        times = "".join(
            f"{row[f'{c}_median_us']:10.0f}{row[f'{c}_p99_us']:8.0f}" for c in ("schedule", "commit", "both")
        )
        print(
            f"{name:8}{times}{row['mean_batch_tokens']:8}{row['num_running']:8}{row['num_preemptions']:10}", flush=True
        )
    if arguments.json:
        write_record(arguments.json, arguments, results)
    target_s = target_for(arguments.requests)
    is_slow = any(row["both_median_us"] > target_s * 1e6 for row in results.values())
    if arguments.check and is_slow:
        print(f"too slow: the median of schedule + commit exceeds {target_s * 1e3:g} ms", file=sys.stderr)
    return int(arguments.check and is_slow)


def target_for(num_requests: int) -> float:
    """Seconds that schedule + commit may take, by median."""
    return MAX_MEDIAN_S if num_requests <= 1000 else MAX_MEDIAN_MANY_S


def write_record(path: Path, arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Write everything needed to judge or repeat the run."""
    machine = detect_machine()
    medians = [row["both_median_us"] for row in results.values()]
    write_document(
        path,
        "scheduler",
        headline={
            "what": f"one iteration of the scheduler (schedule + commit), {arguments.requests:,} running requests",
            "measured": f"{min(medians) / 1e3:.2f} to {max(medians) / 1e3:.2f} ms, medians of {len(medians)} workloads",
            "target": f"{target_for(arguments.requests) * 1e3:g} ms on one core",
            "hardware": f"{machine.cpu_name}, one core",
        },
        options={name: value for name, value in vars(arguments).items() if name not in ("json", "check")},
        workloads=results,
    )


if __name__ == "__main__":
    sys.exit(main())
