"""Churns the tiers of the KV cache for a long time, without a model, and checks every page that is read.

The real scheduler runs with small random pools, host memory and a disk store; requests of conversations come, go on,
are cancelled, preempted and fail. The executor is that of the property tests (`tests/unit/fake_tiers.py`): it makes
copies as late as a GPU may, and knows of each page the tokens whose keys are in it. Now and then the engine is lost
without warning; the next one, often of another size, finds what is on the disk. Every answer must be the one that the
request would get alone, nothing that failed may be read again, and counts must agree after every step.

    python -m benchmarks.robustness.tier_churn --minutes 60 --json benchmarks/results/tier_churn.json
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.unit.drafting_executor import repetitive_token
from tests.unit.fake_executor import answer_alone
from tests.unit.fake_tiers import TierDrive

from nanoflow.cli.options import CommandParser
from nanoflow.kvcache.disk import DiskTier
from nanoflow.kvcache.keys import page_keys, root_key, split
from nanoflow.kvcache.sizes import PoolSize, most_pages
from nanoflow.outputs import FinishReason
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import SchedulerLimits
from nanoflow.scheduler.drafts import Drafter
from nanoflow.speculation import NgramSpeculation

VOCAB_SIZE = 31
_PAGE_SIZES, _WINDOWS = (1, 2, 4), ((None,), (None, 7), (9, None))
_NUM_TALKS, _MOST_TOKENS = 40, 90
_POISONS_A_LIFE = 10**6
_NGRAM = NgramSpeculation(num_draft_tokens=3, longest_match=2, shortest_match=1)


@dataclass(slots=True)
class World:
    """What outlives a crash.

    Attributes:
        rng: For everything.
        folder: Stores of all sizes of pages.
        talks: Prompts of conversations so far.
        settled: Poison that a failed request has told of: it must never be read again.
        counts: What has happened.
    """

    rng: random.Random
    folder: Path
    talks: list[list[int]] = field(default_factory=list)
    settled: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)


class Life:
    """One engine, from its start to its end or crash."""

    def __init__(self, world: World) -> None:
        rng, number = world.rng, world.counts["lives"]
        self.world, self.rng = world, rng
        page_size, windows = rng.choice(_PAGE_SIZES), rng.choice(_WINDOWS)
        max_batch_tokens, max_model_len = rng.randint(4, 64), rng.randint(20, _MOST_TOKENS)
        pools = tuple(
            PoolSize(
                num_pages=rng.randint(0, 40)
                + most_pages(window, max_model_len, page_size=page_size, max_batch_tokens=max_batch_tokens),
                window=window,
            )
            for window in windows
        )
        self.limits = SchedulerLimits(
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=rng.randint(1, 8),
            max_model_len=max_model_len,
            num_pages=max(pool.num_pages for pool in pools),
            page_size=page_size,
            vocab_size=VOCAB_SIZE,
            group_pools=pools,
        )
        self.disk = DiskTier.open(
            world.folder,
            capacity_bytes=rng.choice((1, 4)) << 20,
            fingerprint=f"{page_size} {len(windows)}",
            page_bytes=[24 * page_size] * len(windows),
        )
        self.drive = TierDrive(
            self.limits,
            depth=rng.randint(0, 2),
            num_slots=rng.choice((4, 30, 100, 400)),
            seed=rng.getrandbits(32),
            disk=self.disk,
            drafts=Drafter(_NGRAM, max_num_seqs=self.limits.max_num_seqs) if rng.random() < 0.3 else None,
            model=repetitive_token,
            poison=rng.choice((0.0, 0.002)),
            pace=rng.choice((0.1, 0.5, 1.0)),
        )
        executor = self.drive.tier_executor
        executor.first_poison(number * _POISONS_A_LIFE, world.settled)
        self.requests: dict[int, Request] = {}
        self.aborted: set[int] = set()
        self.num_requests = 0
        world.counts["lives"] += 1

    def run(self, num_steps: int, until_s: float) -> None:
        """So many steps, fewer if the time is over; then an orderly end, or a crash."""
        for _ in range(num_steps):
            if time.monotonic() > until_s:
                break
            self._disturb()
            self._step()
        if self.rng.random() < 0.7:
            # What failed is forgotten by a thread; until that has ended a crash may bring it back.
            self.drive.below._forgetter.shutdown()
            self.disk.close()
            self.world.counts["crashes"] += 1
        else:
            while self.drive.is_busy:
                self._step()
            self.drive.come_to_rest()
            self.drive.close()
            self.world.counts["ends"] += 1
        self._count()

    def _disturb(self) -> None:
        scheduler, chance = self.drive.scheduler, self.rng.random()
        if scheduler.num_waiting < 6 and chance < 0.3:
            self._add()
        elif chance < 0.31 and self.requests:
            request_id = self.rng.choice(list(self.requests))
            if scheduler.abort(request_id):
                self.aborted.add(request_id)
                # If its load was just refused, that of the next one may be too.
                self.drive.num_fruitless = 0
        elif chance < 0.33 and self.requests:
            keys = split(self.rng.choice(list(self.requests.values())).page_keys)[1:]
            self.world.counts["prefetched pages"] += scheduler.prefetch(keys).num_prefetched_pages
        elif chance < 0.3302:
            scheduler.reset_prefix_cache()
            self.world.counts["resets"] += 1

    def _step(self) -> None:
        self.drive.step()
        if self.drive.num_fruitless > 1:
            raise RuntimeError(f"nothing moves; waiting: {[each.request for each in self.drive.scheduler._waiting]}")
        self.drive.scheduler.check_integrity()
        self.world.counts["steps"] += 1
        for request_id in [each for each in self.requests if self.drive.answers[each].finish or each in self.aborted]:
            self._judge(self.requests.pop(request_id))

    def _add(self) -> None:
        """The next turn of a conversation, or a new one; some begin alike."""
        rng, talks = self.rng, self.world.talks
        if talks and rng.random() < 0.7:
            prompt = list(rng.choice(talks))
        else:
            family = rng.randrange(4)
            prompt = [(place * place + family) % VOCAB_SIZE for place in range(rng.choice((0, 10, 40)))]
        prompt += [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 5))]
        prompt = prompt[: self.limits.max_model_len - 1]
        max_tokens, root = rng.randint(1, 24), root_key(rng.choice((None, None, "salt")))
        request = Request(
            request_id=self.num_requests,
            prompt_token_ids=prompt,
            page_keys=b"".join([root, *page_keys(prompt, self.limits.page_size, root)]),
            params=SamplingParams(
                max_tokens=max_tokens,
                ignore_eos=rng.random() < 0.5,
                prompt_logprobs=0 if rng.random() < 0.05 else None,
            ),
            seed=rng.randrange(3),
            max_tokens=max_tokens,
            eos_token_ids=(7,),
        )
        self.num_requests += 1
        self.requests[request.request_id] = request
        self.drive.add(request)

    def _judge(self, request: Request) -> None:
        answer = self.drive.answers.pop(request.request_id)
        expected = answer_alone(request, self.limits, repetitive_token)
        is_error = answer.finish is not None and answer.finish.reason is FinishReason.ERROR
        self.world.counts["failed" if is_error else "aborted" if answer.finish is None else "answered"] += 1
        if answer.finish is None or is_error:
            expected = replace(answer, token_ids=expected.token_ids[: len(answer.token_ids)])
        if answer != expected:
            raise RuntimeError(f"{request}: got {answer}, expected {expected}")
        talk = [*request.prompt_token_ids, *answer.token_ids]
        if len(talk) < _MOST_TOKENS - 10:
            self.world.talks = [*self.world.talks[-_NUM_TALKS:], talk]

    def _count(self) -> None:
        drive, counts = self.drive, self.world.counts
        self.world.settled |= set(drive.tier_executor.settled)
        counts["loads"] += drive.num_loads
        counts["saves"] += drive.num_saves
        counts["preemptions"] += drive.scheduler.num_preemptions
        counts["evicted from host"] += sum(host.num_evicted for host in drive.hosts)
        counts["written to disk"] += self.disk.counts.num_written
        counts["read from disk"] += self.disk.counts.num_hits


def run(world: World, minutes: float) -> float:
    """Live, crash and live again for so many minutes; the seconds that it took."""
    begin_s = time.monotonic()
    until_s, shown_s = begin_s + 60 * minutes, begin_s
    while time.monotonic() < until_s:
        Life(world).run(world.rng.choice((20, 200, 2000)), until_s)
        if time.monotonic() > shown_s + 10:
            shown_s = time.monotonic()
            print(f"{shown_s - begin_s:6.0f} s: {dict(world.counts)}", flush=True)
    return time.monotonic() - begin_s


def main(argv: Sequence[str] | None = None) -> int:
    """Churn, print and write."""
    parser = CommandParser(prog="python -m benchmarks.robustness.tier_churn", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--folder", type=Path, help="where stores are made (a folder for temporary files)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything but the disk's times (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        world = World(random.Random(arguments.seed), Path(folder))
        wall_s = run(world, arguments.minutes)
    print(f"{wall_s:.0f} s without a wrong page: {dict(world.counts)}")
    if arguments.json:
        from benchmarks.common.document import write_document

        options = {"minutes": arguments.minutes, "seed": arguments.seed}
        write_document(
            arguments.json, "tier_churn", options=options, wall_s=round(wall_s, 1), counts=dict(world.counts)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
