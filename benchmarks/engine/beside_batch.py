"""Background requests beside interactive ones on this device: what each class gets, alone and together.

One engine, without HTTP and text, runs four times for `--duration` seconds:

1. Requests of the interactive workload, always more of them than run: what the device makes of them at most. The rate
   of the next runs is `--load` of that, unless `--request-rate` says otherwise.
2. Background requests alone, always more of them.
3. Interactive requests alone, at the rate.
4. Both.

The first quarter of a run is not counted as throughput, as background requests start together. From the root of the
repository:

    python -m benchmarks.engine.beside_batch --model preset:llama-3-8b --workload trace:sharegpt.csv \\
        --batch-workload 512/256 --load 0.6 --max-itl-ms 75 --max-ttft-ms 300 \\
        --json benchmarks/results/beside_batch_llama-3-8b.json

It prints the table that `nanoflow simulate --batch-requests` prints. Exit status 1 if a class got no tokens, or if
pages or requests were left over.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.document import write_document
from nanoflow.bench.provenance import portable, portable_options, require_clean, settings_of
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.engine.garbage import heap_left_alone
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.models.presets import preset_name
from nanoflow.priorities import BATCH, Priority
from nanoflow.request import Request, SamplingParams
from nanoflow.run_metrics import RequestRecord
from nanoflow.two_classes import TwoClasses, interactive_of, table, tokens_per_s
from nanoflow.workload import Lengths, draw_arrivals, draw_lengths

_ENGINE = OptionGroup(kind=EngineConfig, title="engine")
_RAMP_UP = 0.25
# Lengths of background requests are drawn once and used again and again.
_NUM_DRAWN = 4096
_LONGEST_SLEEP_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run is asked.

    Attributes:
        lengths, arrivals_s: Of interactive requests, in seconds from the start.
        background: Lengths of background requests, of which there are always `num_at_once`; none if empty.
        num_at_once: See there.
        duration_s: So long background requests are replaced; then the run ends with its interactive ones.
    """

    lengths: Sequence[Lengths] = ()
    arrivals_s: Sequence[float] = ()
    background: Sequence[Lengths] = ()
    num_at_once: int = 0
    duration_s: float


@dataclass(slots=True, kw_only=True)
class _Asked:
    """A request under way: when it came, and when its tokens did, in seconds from the start of the run."""

    num_prompt_tokens: int
    num_output_tokens: int
    arrival_s: float
    is_background: bool
    times_s: list[float] = field(default_factory=list)

    def record(self) -> RequestRecord:
        """As far as it got; with an error if it got no token."""
        times = self.times_s
        return RequestRecord(
            num_prompt_tokens=self.num_prompt_tokens,
            num_requested_tokens=self.num_output_tokens,
            num_output_tokens=len(times),
            arrival_s=self.arrival_s,
            first_token_s=times[0] if times else None,
            finished_s=times[-1] if times else self.arrival_s,
            gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
            error=None if times else "no token",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of a run: records of each class, and tokens/s of the background requests."""

    interactive: list[RequestRecord]
    background: list[RequestRecord]
    background_tokens_per_s: float


class Driver:
    """Runs one piece of work after the other on an engine.

    Args:
        engine: It.
        seed: Of prompts, whose tokens are random.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._rng, self._ids = engine, np.random.default_rng(seed), itertools.count()
        self._asked: dict[int, _Asked] = {}

    def run(self, work: Work) -> Run:
        """One run, at the end of which nothing is left in the engine."""
        self._asked, living = {}, set[int]()
        # Requests are made before the clock starts, but for background ones that come later, about one an iteration.
        coming = [
            (self._prompt(length), arrival_s) for length, arrival_s in zip(work.lengths, work.arrivals_s, strict=True)
        ]
        coming.reverse()
        more = itertools.cycle(work.background) if work.background else iter(())
        start_s, num_background = time.monotonic(), 0
        for length in itertools.islice(more, work.num_at_once):
            living.add(self._add(self._prompt(length), 0.0, start_s, BATCH))
            num_background += 1
        start_s = time.monotonic()
        while True:
            now_s = time.monotonic() - start_s
            while coming and coming[-1][1] <= now_s:
                prompt, arrival_s = coming.pop()
                living.add(self._add(prompt, arrival_s, start_s, 0))
            is_open = now_s < work.duration_s or bool(coming) or len(living) > num_background
            if not is_open:
                break
            for length in itertools.islice(more, work.num_at_once - num_background):
                living.add(self._add(self._prompt(length), now_s, start_s, BATCH))
                num_background += 1
            if not self._engine.has_work:
                wait_s = coming[-1][1] - now_s if coming else work.duration_s - now_s
                time.sleep(min(max(wait_s, 0.0), _LONGEST_SLEEP_S))
                continue
            for request_id in self._step(start_s):
                living.discard(request_id)
                num_background -= self._asked[request_id].is_background
        self._drop(living)
        records = {
            is_background: [each.record() for each in self._asked.values() if each.is_background is is_background]
            for is_background in (False, True)
        }
        rate = tokens_per_s(records[True], _RAMP_UP * work.duration_s, work.duration_s)
        return Run(interactive=records[False], background=records[True], background_tokens_per_s=rate)

    def _prompt(self, length: Lengths) -> Request:
        """A request of this length that comes at 0, with a prompt of its own."""
        facts, request_id, max_tokens = self._engine.facts, next(self._ids), length.num_output_tokens
        prompt: list[int] = self._rng.integers(0, facts.vocab_size, length.num_prompt_tokens).tolist()
        root = root_key(str(request_id))
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False),
            seed=0,
            max_tokens=max_tokens,
            page_keys=b"".join((root, *page_keys(prompt, facts.page_size, root))) if facts.has_prefix_cache else b"",
        )

    def _add(self, made: Request, arrival_s: float, start_s: float, priority: Priority) -> int:
        self._asked[made.request_id] = _Asked(
            num_prompt_tokens=len(made.prompt_token_ids),
            num_output_tokens=made.max_tokens,
            arrival_s=arrival_s,
            is_background=priority == BATCH,
        )
        self._engine.add(dataclasses.replace(made, arrival_s=start_s + arrival_s, priority=priority))
        return made.request_id

    def _step(self, start_s: float) -> list[int]:
        """An iteration; the requests that have ended."""
        output = self._engine.step()
        now_s = time.monotonic() - start_s
        for request_id in output.request_ids:
            self._asked[request_id].times_s.append(now_s)
        return list(output.finished)

    def _drop(self, request_ids: set[int]) -> None:
        self._engine.abort(request_ids)
        while self._engine.has_work:
            self._engine.step()
        self._engine.check_integrity()
        stats = self._engine.stats()
        if stats.pages_in_use or stats.num_running or stats.num_waiting:
            raise RuntimeError(f"something was left over: {stats}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print the table and write the record."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(args.json, allows_dirty=args.allow_dirty)
        if not (args.duration > 0 and 0 < args.load < 1):
            raise ConfigError("--duration must be positive and --load between 0 and 1")
        config = _ENGINE.read(args)
        if preset_name(config.model) is not None:
            config = dataclasses.replace(config, load_format="random")
        lengths, background = (
            draw_lengths(workload, _NUM_DRAWN, seed)
            for workload, seed in ((args.workload, config.seed), (args.batch_workload, config.seed + 1))
        )
    except ValueError as error:
        parser.error(str(error))
    engine = build_engine(config)
    try:
        with heap_left_alone():
            found, runs = compare(Driver(engine, config.seed), engine, config, lengths, background, args)
        settings = settings_of(config, engine.facts)
    finally:
        engine.close()
    print("\n".join(table(found)))
    if args.json is not None:
        options = {name: getattr(args, name) for name in ("load", "request_rate", "duration")}
        write_document(
            args.json,
            "beside_batch",
            options={**options, "workload": portable(args.workload), "batch_workload": portable(args.batch_workload)},
            engine=dataclasses.asdict(portable_options(config)),
            settings=settings,
            **runs,
            result={**dataclasses.asdict(found), "share_of_rest": found.share_of_rest},
        )
    is_whole = found.batch_tokens_per_s > 0 and found.together.num_requests == found.alone.num_requests > 0
    return 0 if is_whole else 1


def make_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.engine.beside_batch", description=__doc__)
    parser.add_argument("--workload", default="512/256", help="of interactive requests (default: 512/256)")
    parser.add_argument("--batch-workload", default="512/256", help="of background requests (default: 512/256)")
    parser.add_argument("--load", type=float, default=0.6, metavar="X", help="interactive load (default: 0.6)")
    parser.add_argument("--request-rate", type=float, metavar="X", help="interactive requests/s, instead of --load")
    parser.add_argument("--duration", type=float, default=90.0, metavar="S", help="seconds of a run (default: 90)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the record to")
    parser.add_argument("--allow-dirty", action="store_true", help="write a record of changed code too")
    _ENGINE.add_to(parser)
    return parser


def compare(
    driver: Driver,
    engine: Engine,
    config: EngineConfig,
    lengths: Sequence[Lengths],
    background: Sequence[Lengths],
    args: Any,
) -> tuple[TwoClasses, dict[str, Any]]:
    """All runs: the comparison, and what else the record has of them."""
    facts, duration_s = engine.facts, args.duration
    always = {"num_at_once": facts.max_num_seqs, "duration_s": duration_s}
    # Everything is used once first: kernels are compiled, graphs captured.
    driver.run(Work(background=background[:64], num_at_once=facts.max_num_seqs, duration_s=duration_s / 20))
    saturated = driver.run(Work(background=lengths, **always)).background_tokens_per_s
    mean = sum(each.num_prompt_tokens + each.num_output_tokens for each in lengths) / len(lengths)
    rate = args.request_rate or args.load * saturated / mean
    print(f"saturated: {saturated:,.0f} tokens/s; interactive requests at {rate:,.2f}/s", file=sys.stderr, flush=True)
    count = max(math.floor(rate * duration_s), 1)
    asked = [each for each, _ in zip(itertools.cycle(lengths), range(count), strict=False)]
    arrivals_s = draw_arrivals(count, rate, config.seed)
    batch_alone = driver.run(Work(background=background, **always)).background_tokens_per_s
    print(f"background requests alone: {batch_alone:,.0f} tokens/s", file=sys.stderr, flush=True)
    alone = driver.run(Work(lengths=asked, arrivals_s=arrivals_s, duration_s=arrivals_s[-1]))
    print(f"interactive requests alone: {interactive_of(alone.interactive)}", file=sys.stderr, flush=True)
    before = engine.stats()
    together = driver.run(
        Work(
            lengths=asked,
            arrivals_s=arrivals_s,
            background=background,
            num_at_once=facts.max_num_seqs,
            duration_s=arrivals_s[-1],
        )
    )
    max_itl_ms = None if facts.limits is None else facts.limits.max_itl_ms
    found = TwoClasses(
        load=sum(each.num_prompt_tokens + each.num_output_tokens for each in asked) / arrivals_s[-1] / saturated,
        alone=interactive_of(alone.interactive),
        together=interactive_of(together.interactive),
        batch_alone_tokens_per_s=batch_alone,
        batch_tokens_per_s=together.background_tokens_per_s,
        max_ttft_s=None if config.max_ttft_ms is None else config.max_ttft_ms / 1e3,
        max_itl_s=None if max_itl_ms is None else max_itl_ms / 1e3,
    )
    more = {
        "saturated_tokens_per_s": saturated,
        "request_rate": rate,
        "num_preemptions": engine.stats().num_preemptions - before.num_preemptions,
        "num_iterations": engine.stats().iteration - before.iteration,
    }
    return found, more


if __name__ == "__main__":
    sys.exit(main())
