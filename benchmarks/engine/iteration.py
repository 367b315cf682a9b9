"""The time of an iteration on this GPU, kernel by kernel, and the gap between two iterations.

Enough requests of one shape keep the engine at its token budget. After a ramp some iterations are traced. A gap is the
time from the last kernel of an iteration, which chooses tokens, to the first kernel of the next forward pass.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.request import Request, SamplingParams

NUM_TRACED = 6
NUM_SHOWN = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A kernel or copy on the GPU, in microseconds of the trace."""

    name: str
    start_us: float
    stop_us: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run, trace, print the table and write the record."""
    parser = CommandParser(prog="python -m benchmarks.engine.iteration", description=__doc__)
    parser.add_argument("--model", default="preset:llama-3-8b")
    parser.add_argument("--input-len", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=512, help="tokens of each completion")
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--quantization", help="of weights, as nanoflow serve takes it")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of keys and values, as nanoflow serve takes it")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--ramp", type=int, default=600, help="iterations before the trace")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--trace", type=Path, help="file for the trace itself, which nanoflow plan show --trace draws")
    args = parser.parse_args(argv)
    config = EngineConfig(
        model=args.model,
        load_format="random",
        dtype="bfloat16",
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_seqs=args.max_num_seqs,
        max_batch_tokens=args.max_batch_tokens,
        cuda_graphs=not args.no_cuda_graphs,
    )
    engine = build_engine(config)
    add_requests(engine, args.input_len, args.output_len, args.ramp * args.max_batch_tokens)
    for _ in range(args.ramp):
        engine.step()
    events = trace(engine, args.trace)
    engine.close()
    summary = summarise(events)
    print_summary(args.model, summary)
    if args.json is not None:
        options = {key: value for key, value in vars(args).items() if key not in ("json", "trace")}
        write_document(
            args.json,
            "iteration",
            options=options,
            **summary,
        )
    return 0


def add_requests(engine: Engine, input_len: int, output_len: int, num_tokens: int) -> None:
    """Add more requests than the ramp and the trace can finish."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    for request_id in range(num_tokens // input_len + 2 * NUM_TRACED):
        prompt = rng.integers(100, engine.facts.vocab_size, input_len).tolist()
        engine.add(
            Request(request_id=request_id, prompt_token_ids=prompt, params=params, seed=0, max_tokens=output_len)
        )


def trace(engine: Engine, path: Path | None) -> list[Event]:
    """Events on the GPU in some whole iterations, in order of time; written to a file too if one is given."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_TRACED):
            engine.step()
        torch.cuda.synchronize()
    if path is not None:
        profiler.export_chrome_trace(str(path))
    events = [
        Event(name=event.name, start_us=event.time_range.start, stop_us=event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    return sorted(events, key=lambda event: event.start_us)


def summarise(events: Sequence[Event]) -> dict[str, Any]:
    """Microseconds an iteration: its span, its busy time, the gap to the next, and each kernel."""
    kernels = [event for event in events if not event.name.startswith("Mem")]
    starts = [i for i, event in enumerate(kernels) if "_gather" in event.name and _is_head(kernels, i)]
    num_iterations = len(starts)
    spans, gaps = [], []
    for first, following in itertools.pairwise(starts):
        spans.append(kernels[following].start_us - kernels[first].start_us)
        # Tokens are chosen after the logits; the next forward pass begins with its embedding.
        embed = max(i for i in range(first, following) if "_gather" in kernels[i].name)
        busy_before = max(event.stop_us for event in kernels[first:embed] if _is_choice(event))
        gaps.append(kernels[embed].start_us - busy_before)
    total: dict[str, float] = defaultdict(float)
    for event in kernels[starts[0] : starts[-1]]:
        total[event.name] += (event.stop_us - event.start_us) / (num_iterations - 1)
    return {
        "num_iterations": num_iterations - 1,
        "span_us": statistics.median(spans),
        "busy_us": _busy_us(kernels[starts[0] : starts[-1]]) / (num_iterations - 1),
        "gap_us": {"median": statistics.median(gaps), "max": max(gaps)},
        "kernels_us": dict(sorted(total.items(), key=lambda item: -item[1])),
    }


def _is_head(kernels: Sequence[Event], i: int) -> bool:
    """Whether a gather takes the rows with logits. It is the last gather before tokens are chosen."""
    later = kernels[i + 1 : i + 12]
    choice = next((k for k, event in enumerate(later) if _is_choice(event)), None)
    return choice is not None and not any("_gather" in event.name for event in later[:choice])


def _is_choice(event: Event) -> bool:
    names = ("reduce", "argmax", "choose_program", "largest_program")
    return any(name in event.name.lower() for name in names)


def _busy_us(events: Sequence[Event]) -> float:
    """Time in which at least one event runs."""
    busy, reached = 0.0, events[0].start_us
    for event in events:
        busy += max(event.stop_us - max(event.start_us, reached), 0.0)
        reached = max(reached, event.stop_us)
    return busy


def print_summary(model: str, summary: dict[str, Any]) -> None:
    span, busy, gap = summary["span_us"], summary["busy_us"], summary["gap_us"]
    print(f"{model}: {summary['num_iterations']} iterations of {span:,.0f} us, busy {busy:,.0f} us ({busy / span:.2%})")
    print(f"gap between iterations: median {gap['median']:,.0f} us ({gap['median'] / span:.2%}), max {gap['max']:,.0f}")
    for name, time_us in list(summary["kernels_us"].items())[:NUM_SHOWN]:
        print(f"{time_us:>10,.0f} us  {name[:90]}")


if __name__ == "__main__":
    sys.exit(main())
