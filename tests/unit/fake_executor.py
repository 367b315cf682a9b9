"""A deterministic model behind the executor's contract, for tests of the scheduler.

The next token is a hash of the seed and all tokens before it. The executor learns those tokens only from batches: it
keeps a simulated KV cache of (token, position) a slot for each KV group and reads every context back through the page
table, so a wrong slot, a page with two holders or a wrong token fails the test at the place where it happens. What lies
in free pages is lost, so a page that is taken back too early fails it too.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nanoflow.batch import Bool, DenseBatch, Int32, Joined, PromptScore, SampledTokens
from nanoflow.kvcache.pools import PagePools
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request
from nanoflow.scheduler import Scheduler, SchedulerLimits
from nanoflow.scheduler.drafts import Drafts
from nanoflow.scheduler.key_events import Put
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.tiers import Tiers


def next_token(seed: int, tokens: list[int], vocab_size: int) -> int:
    """What the fake model says after `tokens`."""
    return zlib.crc32(np.array([seed, *tokens], dtype=np.int64).tobytes()) % vocab_size


def choose_token(seed: int, tokens: list[int], vocab_size: int, forbidden: tuple[int, ...]) -> int:
    """The model's token, or the next higher id that is allowed."""
    token = next_token(seed, tokens, vocab_size)
    while token in forbidden:
        token = (token + 1) % vocab_size
    return token


# Seed, tokens so far, size of the vocabulary, tokens that may not be chosen.
Model = Callable[[int, list[int], int, tuple[int, ...]], int]


@dataclass(kw_only=True)
class Answer:
    """What a request has got."""

    token_ids: list[int] = field(default_factory=list)
    finish: Finished | None = None


def answer_alone(request: Request, limits: SchedulerLimits, model: Model = choose_token) -> Answer:
    """What a request must get, worked out token by token without any batch."""
    params, tokens, answer = request.params, list(request.prompt_token_ids), Answer()
    eos = () if params.ignore_eos else request.eos_token_ids
    own = tuple(params.stop_token_ids or ())
    max_tokens = min(request.max_tokens, limits.max_model_len - len(tokens))
    while answer.finish is None:
        may_stop = len(answer.token_ids) >= params.min_tokens
        token = model(request.seed, tokens, limits.vocab_size, () if may_stop else (*eos, *own))
        tokens.append(token)
        answer.token_ids.append(token)
        if token in eos:
            answer.finish = Finished(reason=FinishReason.STOP)
        elif token in own:
            answer.finish = Finished(reason=FinishReason.STOP, stop_token_id=token)
        elif len(answer.token_ids) == max_tokens:
            answer.finish = Finished(reason=FinishReason.LENGTH)
    return answer


@dataclass(kw_only=True)
class _Tenant:
    """A row as the executor sees it: who joined, and the tokens since (in flight ones too)."""

    joined: Joined
    tokens: list[int]
    num_computed: int = 0


class FakeExecutor:
    """Runs batches in order and checks that each makes sense on its own."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.tenants: dict[int, _Tenant] = {}
        pages_per_row = -(-limits.max_model_len // limits.page_size)
        self.page_tables = np.zeros((len(limits.pools) * limits.max_num_seqs, pages_per_row), np.int32)
        num_slots = [pool.num_pages * limits.page_size for pool in limits.pools]
        self.cached_tokens = [np.full(count, -1) for count in num_slots]
        self.cached_positions = [np.full(count, -1) for count in num_slots]

    def forget(self, group: int, is_free: Bool) -> None:
        """Lose what stands in the free pages of a group, bool [pages]."""
        is_lost = np.repeat(is_free, self.limits.page_size)
        self.cached_tokens[group][is_lost] = self.cached_positions[group][is_lost] = -1

    def table(self, group: int, row: int) -> Int32:
        """The page table of a row of the state table."""
        table: Int32 = self.page_tables[group * self.limits.max_num_seqs + row]
        return table

    def run(self, batch: DenseBatch) -> SampledTokens:
        """Compute a batch: write its tokens to the cache, read the contexts back, sample."""
        self.check_shapes(batch)
        for joined in batch.joined:
            index = batch.rows.tolist().index(joined.row)
            # What it found in the cache need not be computed; `check_context` sees whether it is there.
            first = int(batch.positions[batch.query_start[index]])
            self.tenants[joined.row] = _Tenant(joined=joined, tokens=joined.token_ids.tolist(), num_computed=first)
        self.take_pages(batch)
        for index in range(batch.num_requests):
            self.write(batch, index)
        for index in range(batch.num_requests):
            self.check_context(batch, index)
        for score in batch.prompt_scores:
            self.check_score(batch, score)
        return SampledTokens(token_ids=np.array(self.draw(batch), dtype=np.int32))

    def draw(self, batch: DenseBatch) -> list[int]:
        """A token for each request that has caught up."""
        assert (np.diff(batch.sampled) > 0).all()
        return [self.sample(batch, index) for index in batch.sampled.tolist()]

    def check_shapes(self, batch: DenseBatch) -> None:
        lengths = np.diff(batch.query_start)
        assert 0 < batch.num_tokens <= self.limits.max_batch_tokens
        assert batch.query_start[0] == 0 and batch.query_start[-1] == batch.num_tokens
        assert (lengths > 0).all() and (lengths[: batch.num_decodes] == 1).all()
        assert len(set(batch.rows.tolist())) == batch.num_requests <= self.limits.max_num_seqs
        assert batch.num_tokens == len(batch.positions) == len(batch.is_fed_back)
        assert len(batch.slots) == len(self.limits.pools) * batch.num_tokens
        for slots in batch.slots.reshape(-1, batch.num_tokens):
            assert len(set(slots.tolist())) == batch.num_tokens
        assert ((batch.token_ids >= 0) & (batch.token_ids < self.limits.vocab_size)).all()
        for name in ("rows", "query_start", "context_len", "token_ids", "positions", "sampled"):
            assert getattr(batch, name).dtype == np.int32, name
        assert batch.slots.dtype == batch.epochs.dtype == np.int64 and batch.is_fed_back.dtype == np.bool_

    def take_pages(self, batch: DenseBatch) -> None:
        """Note the new pages: each at a place of its own, and the table wide enough for every request."""
        new = batch.new_pages
        assert new.rows.dtype == new.columns.dtype == new.pages.dtype == np.int32
        assert len(set(zip(new.rows.tolist(), new.columns.tolist(), strict=True))) == len(new)
        most = np.array([pool.num_pages for pool in self.limits.pools])[new.rows // self.limits.max_num_seqs]
        assert ((new.pages >= 0) & (new.pages < most)).all()
        assert batch.table_width == -(-int(batch.context_len.max()) // self.limits.page_size)
        assert (new.columns < batch.table_width).all()
        self.page_tables[new.rows, new.columns] = new.pages

    def write(self, batch: DenseBatch, index: int) -> None:
        """Write the tokens of one request where the batch says."""
        row, size = int(batch.rows[index]), self.limits.page_size
        tenant = self.tenants[row]
        for place in range(int(batch.query_start[index]), int(batch.query_start[index + 1])):
            position = int(batch.positions[place])
            assert position == tenant.num_computed
            if batch.is_fed_back[place]:
                assert position == len(tenant.tokens) - 1 >= len(tenant.joined.token_ids)
                token = tenant.tokens[-1]
            else:
                token = int(batch.token_ids[place])
            for group, slots in enumerate(batch.slots.reshape(-1, batch.num_tokens)):
                slot = int(slots[place])
                assert slot == int(self.table(group, row)[position // size]) * size + position % size
                self.cached_tokens[group][slot], self.cached_positions[group][slot] = token, position
            tenant.num_computed += 1

    def check_context(self, batch: DenseBatch, index: int) -> None:
        """What a request reads from the cache must be its own tokens, all that its window leaves, in order."""
        row, size = int(batch.rows[index]), self.limits.page_size
        tenant, first_query = self.tenants[row], int(batch.positions[batch.query_start[index]])
        context_len = int(batch.context_len[index])
        assert context_len == tenant.num_computed
        for group, pool in enumerate(self.limits.pools):
            first = 0 if pool.window is None else max(first_query - pool.window + 1, 0)
            positions = np.arange(first, context_len)
            slots = self.table(group, row)[positions // size].astype(np.int64) * size + positions % size
            assert self.cached_positions[group][slots].tolist() == positions.tolist()
            assert self.cached_tokens[group][slots].tolist() == tenant.tokens[first:context_len]
        assert (index in batch.sampled) == (context_len == len(tenant.tokens))

    def check_score(self, batch: DenseBatch, score: PromptScore) -> None:
        joined = self.tenants[int(batch.rows[score.request_index])].joined
        assert joined.params.prompt_logprobs == score.num_logprobs
        assert batch.query_start[score.request_index] <= score.start < score.stop
        assert score.stop <= batch.query_start[score.request_index + 1]
        assert batch.positions[score.start] + 1 == score.first_position
        prompt = joined.token_ids[: joined.num_prompt_tokens].tolist()
        last = score.first_position + score.stop - score.start
        assert last <= len(prompt) and score.target_ids.tolist() == prompt[score.first_position : last]

    def sample(self, batch: DenseBatch, index: int) -> int:
        """Draw the next token of a request; it stays here for the next iteration."""
        tenant = self.tenants[int(batch.rows[index])]
        joined, tokens = tenant.joined, tenant.tokens
        may_stop = len(tokens) - joined.num_prompt_tokens >= joined.params.min_tokens
        forbidden = () if may_stop else joined.stop_token_ids
        tokens.append(choose_token(joined.seed, tokens, self.limits.vocab_size, forbidden))
        return tokens[-1]


class Drive:
    """The engine loop in miniature: schedule, run, commit `depth` iterations late."""

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        depth: int,
        drafts: Drafts | None = None,
        executor: FakeExecutor | None = None,
        put_key_event: Put | None = None,
        make_tiers: Callable[[PagePools], Tiers] | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = Scheduler(
            limits=limits, drafts=drafts, put_key_event=put_key_event, make_tiers=make_tiers, pace=pace, clock=clock
        )
        self.executor = executor or FakeExecutor(limits)
        self.depth = depth
        self.in_flight: deque[tuple[DenseBatch, SampledTokens]] = deque()
        self.answers: dict[int, Answer] = {}
        self.scored: dict[int, set[int]] = {}

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.answers[request.request_id] = Answer()

    def step(self) -> DenseBatch | None:
        """One iteration; None if only a commit was possible."""
        batch = self.scheduler.schedule()
        if batch is not None:
            self.check_windows(batch)
            self.in_flight.append((batch, self.executor.run(batch)))
        if self.in_flight and (batch is None or len(self.in_flight) > self.depth):
            self.commit()
        return batch

    def check_windows(self, batch: DenseBatch) -> None:
        """Pages that no request needs are free: those that all lie before the window of its next token."""
        limits, rows = self.executor.limits, batch.rows.astype(np.int64)
        num_before = batch.positions[batch.query_start[:-1]]
        for group, tables in enumerate(self.scheduler._pages._groups):
            window = limits.pools[group].window
            first_seen = np.zeros_like(num_before) if window is None else np.maximum(num_before - window + 1, 0)
            needed = -(-batch.context_len // limits.page_size) - first_seen // limits.page_size
            assert tables.num_held(rows).tolist() == needed.tolist()
            self.executor.forget(group, tables.pool.empty_mask())

    def commit(self) -> None:
        """Commit the oldest batch on its way and take note of what it gave."""
        batch, result = self.in_flight.popleft()
        committed = self.scheduler.commit(batch, result)
        assert (result.token_ids[committed.places] == committed.token_ids).all()
        for request_id, token in zip(committed.request_ids.tolist(), committed.token_ids.tolist(), strict=True):
            answer = self.answers[request_id]
            assert answer.finish is None
            answer.token_ids.append(token)
        for request_id, finish in committed.finished.items():
            self.answers[request_id].finish = finish
        for scored_id, score in zip(committed.scored, batch.prompt_scores, strict=True):
            if scored_id is not None:
                last = score.first_position + score.stop - score.start
                self.scored.setdefault(scored_id, set()).update(range(score.first_position, last))

    def run_until_idle(self, max_steps: int = 10_000) -> int:
        """Step until nothing is left; the number of steps."""
        for step in range(max_steps):
            if not self.scheduler.has_unfinished and not self.in_flight:
                return step
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps")
