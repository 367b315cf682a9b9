"""The scheduler: forms the dense batch of the next iteration and takes in the tokens of a past one.

It knows no tensors and does not wait: `schedule` may be called before the last batch is committed, since a token's
place is known before its value. A request may get several tokens from one iteration, or none: where its next tokens are
guessed (`drafts.py`), those that do not count (`verify.py`) are taken back. State is in `rows.py` and `kvcache/`, what
a running request computes in `forming.py`, who is let in in `joining.py`, who is sent back in `tenancy.py`, what need
not be computed in `reuse.py`.

Pages and rows of a request are released as soon as its end is known, though an iteration that writes to them may be on
its way; so are pages that a sliding window has left behind, though one may be on its way that reads them. That is safe
because the executor runs iterations in order: a later tenant writes later, and its own tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from nanoflow.batch import Bool, DenseBatch, SampledTokens
from nanoflow.kvcache.keys import split
from nanoflow.kvcache.pages import OutOfPagesError, PagePool
from nanoflow.kvcache.pools import PagePools
from nanoflow.outputs import Finished, FinishReason
from nanoflow.priorities import BATCH, rank_of
from nanoflow.request import Request
from nanoflow.scheduler.background import Background
from nanoflow.scheduler.class_lengths import ClassLengths
from nanoflow.scheduler.drafts import Drafts, NoDrafts
from nanoflow.scheduler.forming import Turn, fill_budget, form_batch
from nanoflow.scheduler.joining import Joining
from nanoflow.scheduler.key_events import Put, key_events
from nanoflow.scheduler.limits import SchedulerLimits, checked_prompt
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.policies import Policies, default_policies
from nanoflow.scheduler.results import Committed, SchedulerEvents, end_of, owners
from nanoflow.scheduler.reuse import PrefetchAnswer, PrefixReuse, ReuseCounts
from nanoflow.scheduler.rows import RowTable
from nanoflow.scheduler.sessions import Session
from nanoflow.scheduler.tenancy import Tenancy
from nanoflow.scheduler.tiers import NoTiers, Tiers
from nanoflow.scheduler.verify import counting_draws
from nanoflow.scheduler.waiting import WaitingQueue, WaitingRequest


class Scheduler:
    """Decides what every iteration computes.

    Used in order: `schedule`, run the batch, `commit` its result; or one iteration ahead: `schedule` the next batch
    before `commit` of the last.

    Args:
        limits: The sizes it works in.
        pace: How many tokens an iteration may have within the token budget. It may be replaced at any time, e.g. when
            the time of iterations has been measured.
        drafts: Guesses what requests will say next; nobody does if not given.
        put_key_event: Is told which pages can be found; nobody if not given.
        make_tiers: Makes what is below the device's pages (`tiers`); nothing is if not given.
        policies: What its rule leaves open; `default_policies` if not given.
        is_ready: Whether a waiting request may run yet; all may if not given.
        clock: Seconds, monotonic: the clock of `Request.arrival_s`.
    """

    def __init__(
        self,
        *,
        limits: SchedulerLimits,
        pace: Pace | None = None,
        drafts: Drafts | None = None,
        put_key_event: Put | None = None,
        make_tiers: Callable[[PagePools], Tiers] | None = None,
        policies: Policies | None = None,
        is_ready: Callable[[Request], bool] = lambda request: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self.pace = limits, pace or Pace()
        self.drafts: Drafts = drafts or NoDrafts()
        self.background = Background(clock, lambda: sum(self.num_background) > 0)
        self._rows = RowTable(limits)
        events = key_events(put_key_event, self._rows, limits.page_size)
        self._pages = PagePools(
            limits.pools,
            num_rows=limits.max_num_seqs,
            max_tokens=limits.max_model_len,
            page_size=limits.page_size,
            watch=events,
        )
        self._waiting = WaitingQueue(is_ready)
        self._lengths = ClassLengths()
        self.tiers: Tiers = make_tiers(self._pages) if make_tiers else NoTiers()
        self._policies = policies or default_policies(self.tiers)
        self._reuse = PrefixReuse(self._pages, limits, events, self.tiers, self._policies.queueing)
        self._tenancy = Tenancy(
            rows=self._rows,
            pages=self._pages,
            waiting=self._waiting,
            reuse=self._reuse,
            lengths=self._lengths,
            victim=self._policies.victim,
            vocab_size=limits.vocab_size,
        )
        self._joining = Joining(
            limits,
            self._policies,
            rows=self._rows,
            pages=self._pages,
            waiting=self._waiting,
            reuse=self._reuse,
            lengths=self._lengths,
            tenancy=self._tenancy,
        )
        self._iteration = 0

    @property
    def has_unfinished(self) -> bool:
        """True while a request waits or runs."""
        return self.num_running + self.num_waiting > 0

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return self._rows.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for admission."""
        return len(self._waiting)

    @property
    def num_background(self) -> tuple[int, int]:
        """Background requests that have a row, and those that wait for admission."""
        return self._rows.num_running - self._rows.num_interactive, self._waiting.num_background

    @property
    def num_preemptions(self) -> int:
        """Requests that were sent back since the start."""
        return self._tenancy.num_preemptions

    @property
    def num_background_preemptions(self) -> int:
        """How many of them were background requests."""
        return self._tenancy.num_background_preemptions

    @property
    def reuse_counts(self) -> ReuseCounts:
        """Tokens that were asked of the cache, and tokens that it had."""
        return self._reuse.counts

    @property
    def pools(self) -> tuple[PagePool, ...]:
        """The pool of KV pages of each group."""
        return self._pages.pools

    @property
    def fullest_pool(self) -> PagePool:
        """The pool of KV pages of which the largest part is in use."""
        return self._pages.fullest

    def add(self, request: Request, num_computed: int = 0) -> None:
        """Put a request at the end of the queue.

        Args:
            request: What to compute.
            num_computed: Tokens of its prompt that are not computed: whatever its pages hold counts as their keys and
                values. For benchmarks that begin in the middle of a request.

        Raises:
            RequestError: It could never run; see `checked_prompt`.
            ValueError: Its id is that of a living request, or nothing of its prompt is left to compute.
        """
        request_id = request.request_id
        if request_id in self._waiting or self._rows.find(request_id) is not None:
            raise ValueError(f"a request with id {request_id} is already there")
        token_ids = checked_prompt(request, self._limits)
        if not 0 <= num_computed < len(token_ids):
            raise ValueError(f"num_computed must be in 0..{len(token_ids) - 1}, got {num_computed}")
        waiting = WaitingRequest(
            request=request,
            token_ids=token_ids,
            num_computed=num_computed,
            page_keys=split(request.page_keys)[1:],
        )
        self._waiting.push_back(waiting)

    def abort(self, request_id: int) -> bool:
        """Forget a request and free what it holds; False if it is unknown or has ended.

        How far it got is learnt from, as from any end, if it has run and got a token.
        """
        row = self._rows.find(request_id)
        if row is None:
            return self._waiting.discard(request_id)
        num_generated = int(self._rows.num_known[row] - self._rows.num_prompt[row])
        if num_generated and not self._rows.is_exact[row]:
            self._lengths.observe_end(num_generated, is_background=self._rows.tenant(row).is_background)
        self._tenancy.release([row])
        return True

    def schedule(self) -> DenseBatch | None:
        """Form the next batch.

        Returns:
            None if nothing can be computed now: there is no request, or all hangs on a batch that has not been
            committed, on pages that are being loaded, or on what makes requests ready. Otherwise there is a batch.
        """
        if self.drafts.awaits_commit(self._rows, self.pace.iteration_time):
            return None
        # Drafts, which may be taken back, are not on their way: what counts as computed now stays so.
        self._pages.slide(self._rows.order, self._rows.num_computed[self._rows.order])
        self._joining.make_way()
        turn, sent_back = self._grown_turn()
        if self._admit(turn, sent_back):
            turn, sent_back = self._grown_turn()
            if sent_back is not None and sent_back < rank_of(BATCH):
                raise OutOfPagesError("more was admitted than fits: the predicted peak is below what is needed at once")
        self._joining.start_loads()
        return self._advance(self._with_drafts(turn)) if len(turn.rows) else None

    def commit(self, batch: DenseBatch, result: SampledTokens) -> Committed:
        """Take in the tokens of a batch; batches are committed in the order in which they were formed.

        Tokens of requests that have been released since (finished, aborted, preempted) are dropped.
        """
        rows, sampled = self._rows, batch.sampled
        is_alive = batch.epochs == rows.epoch[batch.rows]
        ids = rows.request_id[batch.rows]
        scored = owners([score.request_index for score in batch.prompt_scores], ids, is_alive)
        pooled = owners([pooling.request_index for pooling in batch.poolings if pooling.is_last], ids, is_alive)
        has_drafts = batch.num_draft_tokens > 0
        row_of_draw, positions = batch.rows[sampled].astype(np.int64), batch.drawn_positions
        is_stop, is_full = rows.ends(row_of_draw, result.token_ids, positions)
        is_there = is_counting = is_alive[sampled]
        if has_drafts:
            is_last = is_stop | is_full
            is_last[list(result.errors)] = True
            is_counting = is_there & counting_draws(batch, result.token_ids, is_last)
        failed = {int(row_of_draw[place]): place for place in result.errors if is_counting[place]}
        is_kept = is_counting.copy()
        is_kept[list(failed.values())] = False
        places = np.flatnonzero(is_kept)
        kept_rows, token_ids, positions = row_of_draw[places], result.token_ids[places], positions[places]
        is_stop, is_full = is_stop[places], is_full[places]
        rows.record(kept_rows, token_ids, positions)
        self.drafts.note_committed(batch)
        if has_drafts:
            self._take_back(batch, is_alive, is_counting)
        request_ids = rows.request_id[kept_rows]
        finished = {
            int(rows.request_id[row]): Finished(reason=FinishReason.ERROR, error=result.errors[place])
            for row, place in failed.items()
        }
        is_last = is_stop | is_full
        # A length that was known from the start says nothing of those that are not.
        is_telling = ~rows.is_exact[kept_rows]
        num_generated = positions.astype(np.int64) + 1 - rows.num_prompt[kept_rows]
        is_background = rows.are_background(kept_rows)
        self._lengths.observe_tokens(num_generated[is_telling], is_last[is_telling], is_background[is_telling])
        first_rows = kept_rows[(num_generated == 1) & ~is_background]
        self.background.note_first_tokens(self.pace, rows.arrival_s[first_rows])
        ending = np.flatnonzero(is_last)
        for index in ending.tolist():
            request = rows.tenant(int(kept_rows[index]))
            finished[request.request_id] = end_of(request, int(token_ids[index]), is_stop=bool(is_stop[index]))
        for row in failed:
            self._reuse.fail(row)
        self._reuse.note_known(kept_rows, rows)
        self._tenancy.release([*failed, *kept_rows[ending].tolist()])
        return Committed(
            request_ids=request_ids,
            token_ids=token_ids,
            places=places.astype(np.int32),
            finished=finished,
            scored=scored,
            pooled=pooled,
            num_rejected=int(np.count_nonzero(is_there) - np.count_nonzero(is_counting)),
        )

    def prefetch(self, keys: Sequence[bytes]) -> PrefetchAnswer:
        """Advice that a request with these keys will come soon; see `PrefixReuse.prefetch`."""
        return self._reuse.prefetch(keys, self._joining.num_growing)

    def session(self, name: str) -> Session | None:
        """What the last request of a session has left; None if it is not remembered."""
        return self._reuse.sessions.find(name)

    def reset_prefix_cache(self) -> None:
        """Forget what is in the pages of earlier requests, in all tiers; those that run go on."""
        self._pages.forget_all()
        self.tiers.forget_all()

    def drain_events(self) -> SchedulerEvents:
        """What has happened since the last call."""
        return self._tenancy.drain_events()

    def check_integrity(self) -> None:
        """Raise RuntimeError if pages, rows and queue contradict each other."""
        order = self._rows.order
        self._pages.check_integrity(order, self._rows.num_computed[order])
        self._rows.check_integrity()
        self.tiers.check_integrity()
        if any(int(request_id) in self._waiting for request_id in self._rows.request_id[order]):
            raise RuntimeError("a request waits and runs at once")

    def _with_drafts(self, turn: Turn) -> Turn:
        """The turn with drafts if there are any and free pages hold them: for a guess nobody is sent back."""
        drafted = self.drafts.extend(turn, self._rows, self.pace.iteration_time)
        has_room = drafted is turn or self._pages.try_grow(drafted.rows, drafted.num_before + drafted.num_taken)
        return drafted if has_room else turn

    def _take_back(self, batch: DenseBatch, is_alive: Bool, is_counting: Bool) -> None:
        """Draws that do not count leave nothing behind: neither tokens nor pages."""
        num_draws, num_counting = (
            np.bincount(draws, minlength=batch.num_requests) for draws in (batch.sampled, batch.sampled[is_counting])
        )
        concerned = np.flatnonzero(is_alive & (num_draws > 1))
        rows = batch.rows[concerned].astype(np.int64)
        self._rows.take_back(rows, (num_draws - num_counting)[concerned])
        self._pages.shrink(rows, self._rows.num_computed[rows])
        self.drafts.note_verified(batch, is_alive, num_counting)

    def _grown_turn(self) -> tuple[Turn, int | None]:
        """The next turn, whose requests have their pages, and the lowest rank of those that were sent back for it."""
        sent_back: list[int] = []
        while True:
            turn = fill_budget(self._rows, self.pace, self.background, self._limits.max_batch_tokens)
            if self._pages.try_grow(turn.rows, turn.num_before + turn.num_taken):
                return turn, min(sent_back, default=None)
            sent_back.append(self._tenancy.send_back())

    def _admit(self, turn: Turn, before: int | None) -> bool:
        """Let in who can join now, of lower rank than those that were sent back; False if nobody can."""
        newcomers = self._joining.admit(turn, before)
        self.drafts.join(newcomers, [self._rows.tenant(row) for row in newcomers.tolist()])
        # Less urgent ones may compute less than they have got pages for.
        behind = self._rows.behind(newcomers)
        self._pages.shrink(behind, self._rows.num_computed[behind])
        return len(newcomers) > 0

    def _advance(self, turn: Turn) -> DenseBatch:
        """The turn as a batch; its tokens count as computed and its samplers' next tokens as there."""
        self._iteration += 1
        joined = self._tenancy.take_joined(turn.rows)
        batch = form_batch(turn, self._rows, self._pages, iteration=self._iteration, joined=joined)
        self._rows.num_computed[turn.rows] += turn.num_taken
        self._reuse.note_computed(turn.rows, self._rows.num_computed[turn.rows])
        self._rows.num_tokens[turn.rows] += np.bincount(batch.sampled, minlength=len(turn.rows))
        self.drafts.note_formed(batch)
        self.background.note_formed(turn.num_background, batch.num_tokens)
        return batch
