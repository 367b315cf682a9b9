"""The body of the engine's loop: schedule, launch, commit. It works on tokens; front ends make text of them.

With asynchronous scheduling one batch is in flight while the next is formed: a step launches batch i+1 before it reads
the tokens of batch i. The scheduler handles what follows from that for requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.engine.copying import Copying
from nanoflow.engine.iteration_times import IterationTimes
from nanoflow.engine.kv_publisher import NoPublisher, Publisher
from nanoflow.engine.logprobs import consecutive_places, sampled_logprobs
from nanoflow.engine.messages import (
    ClassCounts,
    EngineFacts,
    EngineStats,
    Prefetch,
    PrefetchCounts,
    Prefetched,
    StepOutput,
)
from nanoflow.executor.worker import Worker
from nanoflow.grammars.compiled import Grammars
from nanoflow.graph.operation import BatchShape
from nanoflow.kvcache.keys import KEY_BYTES
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan, PlanError
from nanoflow.priorities import PRIORITY_CLASSES
from nanoflow.request import Request
from nanoflow.scheduler.results import Committed
from nanoflow.scheduler.scheduler import Scheduler
from nanoflow.scheduler.sessions import Session
from nanoflow.scheduler.tiers import counts_of_all

# How long the loop sleeps at most when it has nothing to do but to wait for a grammar.
_WAIT_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """A batch that was launched, its plan, and when it was launched (monotonic seconds)."""

    batch: DenseBatch
    shape: BatchShape
    plan: PipelinePlan
    result: Future[SampledTokens]
    launch_s: float


class Engine:
    """One model on one device.

    Args:
        facts: What front ends must know.
        scheduler, worker, book: The parts of the loop; the worker was made with all plans of the book.
        is_async: Form the next batch while the current one runs.
        publisher: Publishes KV events; it is closed with the engine.
        grammars: The worker's, for which the scheduler waits; None if no request has a grammar.
        times: Estimates iteration times from those measured, for the scheduler; None if it bounds no iteration.
    """

    def __init__(
        self,
        *,
        facts: EngineFacts,
        scheduler: Scheduler,
        worker: Worker,
        book: PlanBook,
        is_async: bool,
        times: IterationTimes | None = None,
        publisher: Publisher | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.facts = facts
        self._scheduler = scheduler
        self._worker = worker
        self._book = book
        self._known_plans = {plan.digest for plan in book.plans}
        self._max_in_flight = 1 if is_async else 0
        self._in_flight: deque[_Launched] = deque()
        self._num_iterations = 0
        self._times = times
        self._last_end_s = self._iterations_s = 0.0
        self._latest_plan: str | None = None
        self._publisher = publisher or NoPublisher()
        self._grammars = grammars
        self._copying = Copying(scheduler.tiers, worker)

    def use_book(self, book: PlanBook) -> None:
        """Choose plans from this book from the next iteration on.

        Raises:
            PlanError: The book has a plan that is not in the book that the engine was made with.
        """
        for plan in book.plans:
            if plan.digest not in self._known_plans:
                raise PlanError(f"plan {plan.name!r} ({plan.digest}) is not of the book that this engine was made with")
        self._book = book

    def add(self, request: Request, num_computed: int = 0) -> None:
        """Take a request. `num_computed` tokens of its prompt count as computed already; see `Scheduler.add`."""
        self._scheduler.add(request, num_computed)
        if self._grammars is not None:
            # Begins to compile its grammar.
            self._grammars.is_ready(request.structured)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Drop requests and free their pages at once; unknown ids are ignored."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """True while a step can make progress."""
        return self._scheduler.has_unfinished or bool(self._in_flight) or self._scheduler.tiers.is_loading

    def step(self) -> StepOutput:
        """One iteration: form a batch, launch it, and commit the oldest batch if it is due."""
        self._copying.collect()
        batch = self._scheduler.schedule()
        self._copying.issue()
        if batch is not None:
            shape = batch.shape
            plan = self._book.choose(shape)
            result = self._worker.launch(batch, plan)
            self._in_flight.append(
                _Launched(batch=batch, shape=shape, plan=plan, result=result, launch_s=time.monotonic())
            )
        elif not self._in_flight:
            self._copying.wait()
            if self._grammars is not None:
                self._grammars.wait(_WAIT_S)
        if batch is None or len(self._in_flight) > self._max_in_flight:
            return self._commit_oldest()
        return self._output()

    def prepare_next(self) -> bool:
        """Capture a CUDA graph or keep KV pages for later requests, in about 50 ms; False if nothing is left to do."""
        has_more = self._copying.idle()
        return self._worker.prepare_next() or has_more

    def stats(self) -> EngineStats:
        """State of the engine now."""
        return self._stats()

    def prefetch(self, wanted: Prefetch) -> Prefetched:
        """Say what is there of the prefix of a request that will come soon, and ask lower tiers for more of it."""
        session = Session(page_keys=wanted.page_keys[KEY_BYTES:], num_tokens=wanted.num_tokens)
        if wanted.session is not None:
            remembered = self._scheduler.session(wanted.session)
            if remembered is None:
                return Prefetched(number=wanted.number, found=None)
            session = remembered
        answer, page_size = self._scheduler.prefetch(session.keys), self.facts.page_size
        found = PrefetchCounts(
            num_tokens=session.num_tokens,
            num_cached_tokens=answer.num_cached_pages * page_size,
            num_prefetched_tokens=answer.num_prefetched_pages * page_size,
        )
        return Prefetched(number=wanted.number, found=found)

    def reset_prefix_cache(self) -> None:
        """Forget what the KV cache has of prompts and completions so far; requests that run go on."""
        self._scheduler.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Check every invariant of scheduler and pages."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Stop the worker; the engine cannot be used afterwards."""
        self._copying.close()
        self._worker.close()
        self._publisher.close()
        if self._grammars is not None:
            self._grammars.close()

    def _commit_oldest(self) -> StepOutput:
        if not self._in_flight:
            return self._output()
        launched = self._in_flight.popleft()
        result = launched.result.result()
        self._note_time(launched)
        committed = self._scheduler.commit(launched.batch, result)
        self._num_iterations += 1
        return self._output(launched.batch, launched.plan, result, committed)

    def _note_time(self, launched: _Launched) -> None:
        """Note how long an iteration took: from its launch or the end of the one before, whichever was later."""
        end_s = time.monotonic()
        time_s, self._last_end_s = end_s - max(launched.launch_s, self._last_end_s), end_s
        self._iterations_s, self._latest_plan = self._iterations_s + time_s, launched.plan.digest
        self._scheduler.drafts.note_time(launched.batch, launched.shape, time_s)
        self._scheduler.tiers.note_iteration(launched.batch.num_tokens, time_s)
        if self._times is not None and self._times.observe(launched.shape, time_s):
            self._scheduler.pace = replace(self._scheduler.pace, iteration_time=self._times.estimate)

    def _output(
        self,
        batch: DenseBatch | None = None,
        plan: PipelinePlan | None = None,
        result: SampledTokens | None = None,
        committed: Committed | None = None,
    ) -> StepOutput:
        events = self._scheduler.drain_events()
        if batch is None or result is None or committed is None:
            return StepOutput(scheduled=events.scheduled, preempted=events.preempted, stats=self.stats())
        request_ids = committed.request_ids.tolist()
        at_place = dict(zip(committed.places.tolist(), request_ids, strict=True)) if result.logprob_places else {}
        return StepOutput(
            request_ids=request_ids,
            token_ids=committed.token_ids.tolist(),
            finished=committed.finished,
            logprobs=sampled_logprobs(result, at_place),
            prompt_logprobs={
                request_id: consecutive_places(top, score.first_position)
                for request_id, score, top in zip(
                    committed.scored, batch.prompt_scores, result.prompt_logprobs, strict=True
                )
                if request_id is not None
            },
            pooled={
                request_id: vector.tobytes()
                for request_id, vector in zip(committed.pooled, result.pooled, strict=True)
                if request_id is not None
            },
            scheduled=events.scheduled,
            preempted=events.preempted,
            stats=self._stats(batch, plan, committed),
        )

    def _stats(
        self,
        batch: DenseBatch | None = None,
        plan: PipelinePlan | None = None,
        committed: Committed | None = None,
    ) -> EngineStats:
        scheduler, drafts, reuse = self._scheduler, self._scheduler.drafts.counts, self._scheduler.reuse_counts
        # A request with a draft is computed like a part of a prompt, and is none.
        num_guessing = batch.num_drafted_requests + batch.num_draft_tokens if batch else 0
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            pages_in_use=scheduler.fullest_pool.num_in_use,
            num_pages=scheduler.fullest_pool.num_pages,
            num_preemptions=scheduler.num_preemptions,
            classes=_class_counts(scheduler),
            prefix_cache_queries=reuse.num_asked,
            prefix_cache_hits=reuse.num_found,
            tiers=counts_of_all(
                scheduler.tiers,
                scheduler.pools,
                self.facts.page_bytes,
                queries=reuse.num_asked,
                hits=reuse.num_found,
            ),
            num_drafts=drafts.num_drafts,
            num_draft_tokens=drafts.num_draft_tokens,
            num_accepted_tokens=drafts.num_accepted_tokens,
            num_undrafted_requests=drafts.num_undrafted_requests,
            num_prepared=self._worker.num_prepared,
            iteration=self._num_iterations,
            iterations_s=self._iterations_s,
            latest_plan=self._latest_plan,
            iteration_tokens=batch.num_tokens if batch else 0,
            prefill_tokens=batch.num_tokens - batch.num_decodes - num_guessing if batch else 0,
            prefill_ends=int((batch.sampled >= batch.num_decodes).sum()) - num_guessing if batch else 0,
            rejected_tokens=committed.num_rejected if committed else 0,
            plan_digest=plan.digest if plan else None,
        )


def _class_counts(scheduler: Scheduler) -> dict[str, ClassCounts]:
    """Interactive and background requests apart."""
    num_running, num_waiting = scheduler.num_background
    counts = scheduler.background.counts
    num_preemptions = scheduler.num_background_preemptions
    background = ClassCounts(
        num_running=num_running,
        num_waiting=num_waiting,
        num_tokens=counts.num_tokens,
        num_preemptions=num_preemptions,
    )
    interactive = ClassCounts(
        num_running=scheduler.num_running - num_running,
        num_waiting=scheduler.num_waiting - num_waiting,
        num_tokens=counts.num_all_tokens - counts.num_tokens,
        num_preemptions=scheduler.num_preemptions - num_preemptions,
    )
    return dict(zip(PRIORITY_CLASSES, (interactive, background), strict=True))
