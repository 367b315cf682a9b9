"""Sampling on a GPU: device and host time of a draw, by what the requests ask for, at a vocabulary of 128,256.

A point is a CUDA graph of draws, in turn on sets of logits that together fill several L2 caches, replayed for at least
half a second. The table also has the time of the reference implementation in torch; the floor, which is one reading of
the logits at the rate of a copy of them, measured in the same run; and the host time of a whole step of `Sampler`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.document import write_document
from benchmarks.kernels.elementwise import replay_s
from nanoflow.batch import DenseBatch, Joined
from nanoflow.cli.options import CommandParser
from nanoflow.device.transfer import to_device
from nanoflow.executor.sampler import Sampler
from nanoflow.executor.sampling_state import SamplingState
from nanoflow.kernels import sample
from nanoflow.profiler.site import equal_requests
from nanoflow.request import SamplingParams

VOCAB_SIZE, PROMPT_LEN, PAGE_SIZE = 128256, 512, 16
DEVICE, L2_CACHES, NUM_LAUNCHES = torch.device("cuda"), 4, 40
STOP_TOKEN_IDS = (128001, 128009)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top_k 50, top_p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.3},
    "penalties, top_p 0.95": {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "min_tokens": {"temperature": 0.0, "min_tokens": 16},
    "16 biases": {"temperature": 0.0, "logit_bias": {7000 * i: 1.0 for i in range(16)}},
}
MIXED = "mixed"
Issue = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measured case; times in microseconds.

    Attributes:
        case: What the requests ask for.
        logits: Distribution of the logits.
        num_rows: Requests.
        time_us: Device time of the kernels.
        twin_us: Time of the reference implementation in torch; None if not measured.
        floor_us: Time of reading the logits once at the rate of a copy.
        host_us: Host time of a step of `Sampler`, with its upload.
    """

    case: str
    logits: str
    num_rows: int
    time_us: float
    twin_us: float | None
    floor_us: float
    host_us: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write a record if asked."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.sampling needs an NVIDIA GPU", file=sys.stderr)
        return 1
    dtype = getattr(torch, args.dtype)
    if args.tune:
        tune(args.rows, dtype, args.seconds)
        return 0
    points = []
    print(f"{'case':<24}{'logits':<8}{'rows':>6}{'us':>9}{'twin us':>10}{'floor us':>10}{'of floor':>10}{'host us':>9}")
    copied = copy_gb_per_s(args.seconds)
    for num_rows, shape in itertools.product(args.rows, args.logits):
        for name in args.cases:
            points.append(measure(name, shape, num_rows, dtype, copied, args))
            report(points[-1])
    if args.before:
        print(f"the same with the sources of {args.before}:", flush=True)
        measure_other(args.before, args)
    if args.json:
        write_document(
            args.json,
            "kernels_sampling",
            shape=f"vocabulary of {VOCAB_SIZE}, {args.dtype}, logits in turns over {L2_CACHES} L2 caches",
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.kernels.sampling", description=__doc__)
    names = [*CASES, MIXED]
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256, 1024], help="requests of a draw")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="what the requests ask for")
    parser.add_argument("--logits", nargs="+", choices=list(LOGITS), default=["normal"], help="their distribution")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="their type")
    parser.add_argument("--twins", action="store_true", help="measure the twins in torch too")
    parser.add_argument("--tune", action="store_true", help="try sizes of blocks and numbers of warps instead")
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of a point")
    parser.add_argument("--before", type=Path, help="src folder of another revision, to be measured after this one")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(args.rows) < 1 or args.seconds <= 0:
        parser.error("--rows must be at least 1, --seconds above 0")
    return args


def measure_other(sources: Path, args: argparse.Namespace) -> None:
    """The same points with the kernels of another source tree, in a process of its own."""
    options = ["--dtype", args.dtype, "--seconds", str(args.seconds), "--rows", *map(str, args.rows)]
    command = [sys.executable, "-m", "benchmarks.kernels.sampling", *options, "--cases", *args.cases, "--logits"]
    environment = {**os.environ, "PYTHONPATH": f"{sources.resolve()}{os.pathsep}{Path.cwd()}"}
    subprocess.run([*command, *args.logits], env=environment, check=True)


def normal(num_rows: int, dtype: torch.dtype) -> Tensor:
    """Logits as random weights give them: no token stands out, and half of the vocabulary has weight."""
    return torch.randn(num_rows, VOCAB_SIZE, device=DEVICE).to(dtype)


def peaked(num_rows: int, dtype: torch.dtype) -> Tensor:
    """Logits as a trained model gives them: few tokens stand out, and a long tail has little weight."""
    logits = 2 * torch.randn(num_rows, VOCAB_SIZE, device=DEVICE)
    favourites = torch.randint(VOCAB_SIZE, (num_rows, 30), device=DEVICE)
    heights = 12 + 3 * torch.randn(num_rows, 30, device=DEVICE)
    return logits.scatter_(1, favourites, heights).to(dtype)


LOGITS = {"normal": normal, "peaked": peaked}


def params_of(case: str, num_rows: int) -> list[SamplingParams]:
    """Sampling parameters, one for each row; in mixed rows all kinds take turns."""
    chosen = list(CASES.values()) if case == MIXED else [CASES[case]]
    return [SamplingParams(**chosen[row % len(chosen)]) for row in range(num_rows)]


def joins(params: Sequence[SamplingParams]) -> list[Joined]:
    """Requests with a prompt, one for each row."""
    rng = np.random.default_rng(0)
    return [
        Joined(
            row=row,
            params=param,
            seed=row,
            token_ids=rng.integers(0, VOCAB_SIZE, PROMPT_LEN, dtype=np.int32),
            num_prompt_tokens=PROMPT_LEN,
            stop_token_ids=STOP_TOKEN_IDS,
        )
        for row, param in enumerate(params)
    ]


def batch_of(num_rows: int) -> DenseBatch:
    """A batch with one decode of each request, which draws its first token."""
    return equal_requests(num_rows, PROMPT_LEN - 1, 1, PAGE_SIZE, is_decode=True)


@torch.inference_mode()
def measure(
    case: str, shape: str, num_rows: int, dtype: torch.dtype, copied_gb_per_s: float, args: argparse.Namespace
) -> Point:
    """Measure a case at one size."""
    from nanoflow.kernels import triton_sample

    params = params_of(case, num_rows)
    sets = logit_sets(shape, num_rows, dtype)
    issues = issues_of(triton_sample, params, sets)
    time_us = device_us(issues, args.seconds)
    twin_us = eager_us(issues_of(sample, params, sets[:1])) if args.twins else None
    host_us = step_us(params, sets[0])
    return Point(
        case=case,
        logits=shape,
        num_rows=num_rows,
        time_us=time_us,
        twin_us=twin_us,
        floor_us=sets[0].nbytes / copied_gb_per_s * 1e-3,
        host_us=host_us,
    )


def logit_sets(shape: str, num_rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Sets of logits that are used in turn."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    num_sets = max(2, -(-L2_CACHES * l2_bytes // (num_rows * VOCAB_SIZE * dtype.itemsize)))
    return [LOGITS[shape](num_rows, dtype) for _ in range(num_sets)]


def issues_of(kernels: Any, params: Sequence[SamplingParams], sets: Sequence[Tensor], **options: Any) -> list[Issue]:
    """Draws from each set of logits, by the kernels or by their reference; all other data is on the device."""
    state = SamplingState(num_rows=len(params), vocab_size=VOCAB_SIZE, device=DEVICE)
    state.join(joins(params))
    rows = np.arange(len(params), dtype=np.int32)
    numbers = state.numbers(rows, np.full(len(params), PROMPT_LEN, np.int32))
    uploaded = to_device(numbers.view(np.int32).reshape(len(params), -1), DEVICE)
    scored = to_device(np.flatnonzero([param.logprobs is not None for param in params]), DEVICE)
    num_top = max((param.logprobs or 0 for param in params), default=0)
    adjusts = any(param.has_penalties or param.logit_bias or param.min_tokens for param in params)
    is_plain = not adjusts and all(param.is_greedy for param in params)

    def issue(logits: Tensor) -> object:
        if is_plain:
            token_ids, _ = kernels.largest(logits, **options)
        else:
            token_ids, _ = kernels.choose(logits, uploaded, state.tables, adjusts=adjusts, **options)
        return kernels.top_logprobs(logits, scored, token_ids[scored], num_top) if len(scored) else token_ids

    return [lambda logits=logits: issue(logits) for logits in sets]  # type: ignore[misc]


def device_us(issues: Sequence[Issue], seconds: float) -> float:
    """Mean device time of a call under sustained load."""
    for issue in issues:
        issue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    num_launches = max(len(issues), NUM_LAUNCHES)
    with torch.cuda.graph(graph):
        for issue in itertools.islice(itertools.cycle(issues), num_launches):
            issue()
    once_s = replay_s(graph, 2)
    return replay_s(graph, max(2, int(seconds / once_s) + 1)) / num_launches * 1e6


def eager_us(issues: Sequence[Issue], num_calls: int = 3) -> float:
    """Mean time of a call that may wait for the device."""
    issues[0]()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for issue in itertools.islice(itertools.cycle(issues), num_calls):
        issue()
    torch.cuda.synchronize()
    return (time.perf_counter() - start_s) / num_calls * 1e6


def step_us(params: Sequence[SamplingParams], logits: Tensor) -> float:
    """Host time of a step of the sampler: the minimum over rounds that fit into the device's queue."""
    sampler = Sampler(num_rows=len(params), vocab_size=VOCAB_SIZE, device=DEVICE)
    sampler.join(joins(params))
    batch, rounds = batch_of(len(params)), []
    for _ in range(6):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        for _ in range(10):
            sampler.sample(batch, logits)
        rounds.append((time.perf_counter() - start_s) / 10 * 1e6)
    torch.cuda.synchronize()
    return min(rounds)


def copy_gb_per_s(seconds: float) -> float:
    """GB/s, read and written, of a copy of 1 GiB: an upper limit of the memory's rate."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_us([lambda: target.copy_(source)], seconds) * 1e-3


def tune(rows: Sequence[int], dtype: torch.dtype, seconds: float) -> None:
    """Device time by block size and number of warps."""
    from nanoflow.kernels import triton_sample
    from nanoflow.kernels.triton_sample import RowBlocks

    variants = [
        RowBlocks(block=block, num_warps=num_warps, max_registers=registers)
        for block, num_warps, registers in itertools.product((2048, 4096, 8192), (8, 16, 32), (None, 64, 80, 96))
        if 8 <= block // (32 * num_warps) <= 16 and (registers or 0) * num_warps <= 2048
    ]
    for num_rows, case in itertools.product(rows, ("greedy", "temperature", "top_p 0.95", "top_k 50")):
        sets = logit_sets("normal", num_rows, dtype)
        times = {}
        for variant in variants:
            with torch.inference_mode():
                issues = issues_of(triton_sample, params_of(case, num_rows), sets, blocks=variant)
                times[variant] = device_us(issues, seconds / 4)
        for variant, time_us in sorted(times.items(), key=lambda item: item[1])[:4]:
            size = f"{variant.block:>7} logits{variant.num_warps:>4} warps, registers: {variant.max_registers}"
            print(f"{num_rows:>6} {case:<14}{size:<44}{time_us:>9.1f} us", flush=True)


def report(point: Point) -> None:
    """One line of the table."""
    twin = "-" if point.twin_us is None else f"{point.twin_us:.0f}"
    times = f"{point.time_us:>9.1f}{twin:>10}{point.floor_us:>10.1f}{point.time_us / point.floor_us:>10.2f}"
    print(f"{point.case:<24}{point.logits:<8}{point.num_rows:>6}{times}{point.host_us:>9.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
