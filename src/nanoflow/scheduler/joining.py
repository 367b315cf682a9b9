"""Lets waiting requests in: which of them get a row now, and how much of each is computed already.

Which requests fit is predicted in `admission.py`; what they find in the cache is known to `reuse.py`. The scheduler
asks once an iteration, with the tokens that its running requests leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.batch import Int64, Joined
from nanoflow.kvcache.pools import PagePools
from nanoflow.scheduler.admission import num_admissible
from nanoflow.scheduler.lengths import OutputLength
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.policies import Policies
from nanoflow.scheduler.progress import Progress
from nanoflow.scheduler.reuse import Candidate, PrefixReuse
from nanoflow.scheduler.rows import RowTable, stop_ids
from nanoflow.scheduler.waiting import WaitingQueue

# So many requests of the queue have their prefixes loaded before it is their turn.
_MOST_AHEAD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomers:
    """N requests that have got rows.

    Attributes:
        rows: int64 [N].
        candidates: As they came, the first in the queue first.
    """

    rows: Int64
    candidates: Sequence[Candidate]

    def joined(self, vocab_size: int) -> tuple[Joined, ...]:
        """What the device must know of each."""
        waiting = [candidate.waiting for candidate in self.candidates]
        return tuple(
            Joined(
                row=row,
                params=new.request.params,
                seed=new.request.seed,
                token_ids=new.token_ids,
                num_prompt_tokens=len(new.request.prompt_token_ids),
                stop_token_ids=stop_ids(new.request, vocab_size),
                bad_word_ids=new.request.bad_word_ids,
                thinking=new.request.thinking,
            )
            for row, new in zip(self.rows.tolist(), waiting, strict=True)
        )


class Joining:
    """The way from the queue to a row.

    Args:
        limits: Sizes.
        policies: Who fits, and who overtakes whom.
        rows, pages, waiting, reuse, lengths: The scheduler's.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        policies: Policies,
        *,
        rows: RowTable,
        pages: PagePools,
        waiting: WaitingQueue,
        reuse: PrefixReuse,
        lengths: OutputLength,
    ) -> None:
        self._limits, self._policies = limits, policies
        self._rows, self._pages, self._waiting = rows, pages, waiting
        self._reuse, self._lengths = reuse, lengths
        self._to_load: list[Candidate] = []
        # The request whose prefix found no room on the device. It waits for the end of a running one, and those behind
        # it with it. If nothing ran and nothing was loaded there will not be more room, and it is computed.
        self._refused: int | None = None
        self._computed: tuple[int, ...] = ()

    def admit(self, num_tokens_left: int) -> Newcomers | None:
        """Give rows to as many, first come first served, as tokens, rows and the predicted peak of pages allow.

        Those whose prefix another one computes just now, or whose prefix is loaded, keep their place in the queue, and
        others may pass them.

        Args:
            num_tokens_left: Tokens of the budget that nobody has.

        Returns:
            None if there is nobody to let in.
        """
        candidates = self._reuse.candidates(
            self._waiting,
            max_requests=self._rows.num_free,
            max_tokens=num_tokens_left,
            not_loaded=self._computed,
        )
        candidates = candidates[: self._num_fitting(candidates)] if candidates else []
        self._to_load = [each for each in candidates if each.num_loadable]
        candidates = self._policies.queueing.ready(self._before_refused(candidates))
        if not candidates:
            return None
        for candidate in candidates:
            self._waiting.discard(candidate.waiting.request.request_id)
        rows = self._rows.join(
            [candidate.waiting for candidate in candidates], [each.num_computed for each in candidates]
        )
        for row, candidate in zip(rows.tolist(), candidates, strict=True):
            self._reuse.join(row, candidate)
        self._pages.slide(rows, self._rows.num_computed[rows])
        return Newcomers(rows=rows, candidates=candidates)

    @property
    def num_growing(self) -> int:
        """Pages of a pool that running requests need for the tokens that they have, and one more each."""
        rows, page_size = self._rows.order, self._limits.page_size
        left = self._rows.num_tokens[rows] - self._rows.num_computed[rows]
        return int((-(-left // page_size) + 1).sum())

    def start_loads(self) -> None:
        """Load the prefixes of those that `admit` would have let in with them, into pages that nobody needs now.

        Then those of the next in the queue, if more than a quarter of the device's pages stay free. To be called once
        the batch has its pages. Running requests can still compute all tokens that they have, and grow by a page.
        """
        num_growing = self.num_growing
        refused = (each for each in self._to_load if not self._reuse.start_load(each, num_spare=num_growing))
        self._refused = next((each.waiting.request.request_id for each in refused), None)
        self._to_load, self._computed = [], ()
        if self._refused is not None:
            if not self._rows.num_running and not self._is_loading:
                self._computed = (self._refused,)
            return
        num_spare = max(num_growing, max(pool.num_pages for pool in self._pages.pools) // 4)
        for candidate in self._reuse.next_to_load(self._waiting, _MOST_AHEAD):
            self._reuse.start_load(candidate, num_spare=num_spare)

    @property
    def _is_loading(self) -> bool:
        return any(pool.num_reserved for pool in self._pages.pools)

    def _before_refused(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that come before the one whose prefix found no room, if it still wants it."""
        for index, candidate in enumerate(candidates):
            if candidate.num_loadable and candidate.waiting.request.request_id == self._refused:
                return candidates[:index]
        return candidates

    def _num_fitting(self, candidates: Sequence[Candidate]) -> int:
        """How many of the candidates, from the first, fit by the predicted peak of pages."""
        return num_admissible(
            self._rows.progress(),
            self._progress_of(candidates),
            lambda progress: self._policies.expect(self._lengths, progress),
            pools=self._pages.room,
            page_size=self._limits.page_size,
            max_batch_tokens=self._limits.max_batch_tokens,
            num_shared=np.array([self._pages.num_held(candidate.prefix) for candidate in candidates]),
            is_all_there=not self._is_loading,
        )

    def _progress_of(self, candidates: Sequence[Candidate]) -> Progress:
        """Lengths of waiting requests."""
        waiting = [candidate.waiting for candidate in candidates]
        num_tokens = np.array([len(each.token_ids) for each in waiting])
        num_generated = np.array([each.num_generated for each in waiting])
        max_tokens = np.array([each.request.max_tokens for each in waiting])
        max_total = np.minimum(num_tokens - num_generated + max_tokens, self._limits.max_model_len)
        return Progress(
            num_tokens=num_tokens,
            num_generated=num_generated,
            max_remaining=max_total - num_tokens,
            is_exact=np.array([each.request.params.ignore_eos for each in waiting]),
        )
