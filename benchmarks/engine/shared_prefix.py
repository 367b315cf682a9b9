"""Waves of requests with one long system prompt: time to the first token, beside that of the rest of the prompt alone.

From the root of the repository:

    python -m benchmarks.engine.shared_prefix --model preset:llama-3-8b --json benchmarks/results/shared_prefix.json

Each repeat has a new system prompt and three waves, in which all requests come at once: `first` computes it, `second`
finds it in the KV cache and has other suffixes, and `alone` has suffixes of the same length without it. A wave starts
when the one before has ended. `over_alone` is the median over repeats of a wave's median TTFT over that of `alone` in
the same repeat. Exit status 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from benchmarks.common.document import write_document
from nanoflow.bench.endpoints import EngineEndpoint
from nanoflow.bench.options import BenchConfig
from nanoflow.bench.provenance import portable_options, require_clean, settings_of
from nanoflow.bench.rounds import drive
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import EngineConfig
from nanoflow.conversations import Conversation, Turn
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.models.presets import preset_name
from nanoflow.round_metrics import AskedRound, prompt_tokens
from nanoflow.run_metrics import ttft_s

_WAVES = ("first", "second", "alone")
_ENGINE = OptionGroup(kind=EngineConfig, title="model and engine", defaults={"model": "preset:llama-3-8b"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run all repeats on one engine, print the table and write the record."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        engine = EngineConfig(**_ENGINE.given(args))
        require_clean(args.json, allows_dirty=args.allow_dirty)
    except ValueError as error:
        parser.error(str(error))
    if preset_name(engine.model) is not None:
        engine = replace(engine, load_format="random")
    runs, settings = asyncio.run(_measure(engine, args))
    results = [_result(wave, runs) for wave in _WAVES]
    for each in results:
        print(
            f"{each['wave']:<7} TTFT p50 {each['ttft_p50_s'] * 1e3:8.1f} ms, {each['over_alone']:.3f} of alone, "
            f"{each['num_cached']} of {each['num_asked']} prompt tokens cached"
        )
    if args.json:
        write_document(
            Path(args.json),
            "shared_prefix",
            asked={name: getattr(args, name) for name in ("requests", "prefix", "suffix", "output", "repeats")},
            engine=msgspec.to_builtins(portable_options(engine)),
            settings=settings,
            runs=runs,
            results=results,
        )
    return 1 if any(run["num_failed"] for run in runs) else 0


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.engine.shared_prefix", description=__doc__)
    parser.add_argument("--requests", type=int, default=256, metavar="N", help="requests of a wave (default: 256)")
    parser.add_argument("--prefix", type=int, default=2000, metavar="N", help="tokens that all share (default: 2000)")
    parser.add_argument("--suffix", type=int, default=128, metavar="N", help="tokens of each alone (default: 128)")
    parser.add_argument("--output", type=int, default=16, metavar="N", help="tokens to generate (default: 16)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="times that all is done (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="file to write the record to")
    parser.add_argument("--allow-dirty", action="store_true", help="measure changes that are not committed")
    _ENGINE.add_to(parser)
    return parser


async def _measure(engine: EngineConfig, args: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """Every wave of every repeat, after one that is not counted; and the settings of the engine."""
    running = await AsyncEngine.start(engine)
    try:
        endpoint = EngineEndpoint(running, BenchConfig(num_requests=args.requests, seed=engine.seed))
        runs = []
        for repeat in range(-1, args.repeats):
            rng = np.random.default_rng((engine.seed, repeat + 1))
            for wave, conversations in _waves(args, rng, endpoint.vocab_size):
                driven = await drive(endpoint, conversations, max_concurrency=None, is_shown=False)
                if repeat >= 0:
                    runs.append({"repeat": repeat, "wave": wave, **_summary(driven.asked)})
        return runs, msgspec.to_builtins(settings_of(engine, running.facts))
    finally:
        await running.close()


def _waves(
    args: argparse.Namespace, rng: np.random.Generator, vocab_size: int
) -> Iterator[tuple[str, list[Conversation]]]:
    """The requests of each wave of one repeat."""
    prefix = rng.integers(vocab_size, size=args.prefix).tolist()
    for wave in _WAVES:
        yield (
            wave,
            [
                Conversation(
                    start_s=0.0,
                    is_agent=False,
                    system_token_ids=[] if wave == "alone" else prefix,
                    turns=(Turn(new_token_ids=suffix, num_output_tokens=args.output, think_s=0.0),),
                )
                for suffix in rng.integers(vocab_size, size=(args.requests, args.suffix)).tolist()
            ],
        )


def _summary(asked: Sequence[AskedRound]) -> dict[str, Any]:
    records = [each.record for each in asked if each.record.error is None]
    times = [time_s for record in records if (time_s := ttft_s(record)) is not None]
    prompt = prompt_tokens(asked)
    return {
        "num_failed": sum(each.record.error is not None for each in asked),
        "num_asked": prompt.num_asked,
        "num_cached": prompt.num_cached,
        "ttft_p50_s": median(times) if times else None,
        "ttft_mean_s": sum(times) / len(times) if times else None,
    }


def _result(wave: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats, and the ratio of medians within a repeat."""
    alone = {run["repeat"]: run for run in runs if run["wave"] == "alone"}
    own = [run for run in runs if run["wave"] == wave]
    return {
        "wave": wave,
        "ttft_p50_s": median(run["ttft_p50_s"] for run in own),
        "over_alone": median(run["ttft_p50_s"] / alone[run["repeat"]]["ttft_p50_s"] for run in own),
        "num_asked": own[0]["num_asked"],
        "num_cached": own[0]["num_cached"],
    }


if __name__ == "__main__":
    sys.exit(main())
