"""Lets waiting requests in: which of them get a row now, and how much of each is computed already.

Which requests fit is predicted in `admission.py`; what they find in the cache is known to `reuse.py`. The scheduler
asks once an iteration, with the tokens that its running requests leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanoflow.batch import Int64
from nanoflow.kvcache.pools import PagePools
from nanoflow.priorities import BATCH, rank_of
from nanoflow.scheduler.admission import num_admissible
from nanoflow.scheduler.class_lengths import ClassLengths
from nanoflow.scheduler.forming import Turn
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.policies import Policies
from nanoflow.scheduler.progress import Progress
from nanoflow.scheduler.reuse import Candidate, PrefixReuse
from nanoflow.scheduler.rows import RowTable
from nanoflow.scheduler.tenancy import Tenancy
from nanoflow.scheduler.waiting import WaitingQueue

# So many requests of the queue have their prefixes loaded before it is their turn.
_MOST_AHEAD = 8
# Part of all rows that background requests leave free, so that an interactive one need not wait for one of theirs.
_SPARE_ROWS = 1 / 16


class Joining:
    """The way from the queue to a row.

    Args:
        limits: Sizes.
        policies: Who fits, and who overtakes whom.
        rows, pages, waiting, reuse, lengths, tenancy: The scheduler's.
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
        lengths: ClassLengths,
        tenancy: Tenancy,
    ) -> None:
        self._limits, self._policies, self._tenancy = limits, policies, tenancy
        self._rows, self._pages, self._waiting = rows, pages, waiting
        self._reuse, self._lengths = reuse, lengths
        self._to_load: list[Candidate] = []
        # The request whose prefix found no room on the device. It waits for the end of a running one, and those behind
        # it with it. If nothing ran and nothing was loaded there will not be more room, and it is computed.
        self._refused: int | None = None
        self._computed: tuple[int, ...] = ()
        # Whether that request is an interactive one; whether the last call left out an interactive one that waits.
        self._is_interactive_refused = self._is_first_cut = False

    def admit(self, turn: Turn, before: int | None) -> Int64:
        """Give rows to as many as tokens, rows and the predicted peak of pages allow: by rank, then first come.

        Those whose prefix another one computes just now, or whose prefix is loaded, keep their place in the queue, and
        others may pass them.

        Args:
            turn: What the iteration computes without them.
            before: Only requests of lower rank may join; all if None.

        Returns:
            int64 [N], rows of those that have joined.
        """
        candidates = [*self._interactive(turn, before)]
        if before is None:
            candidates += self._background(turn, candidates)
        self._to_load = [each for each in candidates if each.num_loadable]
        candidates = self._policies.queueing.ready(self._before_refused(candidates))
        while self._rows.num_free < len(candidates):
            self._tenancy.send_back()
        return self._tenancy.join(candidates)

    def _interactive(self, turn: Turn, before: int | None) -> list[Candidate]:
        """Those that fit beside the interactive requests that run, as background ones make way for them."""
        num_first, num_running = self._rows.num_interactive, self._rows.num_running
        rank = rank_of(BATCH)
        candidates = self._reuse.candidates(
            self._waiting.before(rank if before is None else min(before, rank)),
            max_requests=self._rows.num_free + num_running - num_first,
            max_tokens=turn.num_left,
            not_loaded=self._computed,
        )
        self._is_first_cut = False
        if not candidates:
            return []
        # Pages that background requests hold too may go with them.
        is_shared = num_first == num_running
        num_fitting = self._num_fitting(self._rows.progress(num_first), candidates, is_shared=is_shared)
        self._is_first_cut = num_fitting < len(candidates)
        return candidates[:num_fitting]

    def _background(self, turn: Turn, first: Sequence[Candidate]) -> list[Candidate]:
        """Those that fit beside all that run and that join, with some room left; none if an interactive one waits."""
        if self._is_first_cut or not self._waiting.num_background:
            return []
        num_tokens = sum(len(each.waiting.token_ids) - each.num_computed for each in first)
        num_rows = self._rows.num_free - len(first) - int(self._limits.max_num_seqs * _SPARE_ROWS)
        candidates = self._reuse.candidates(
            self._waiting.background(),
            max_requests=max(num_rows, 0),
            max_tokens=min(turn.num_left_background, turn.num_unused) - num_tokens,
            not_loaded=self._computed,
        )
        running = self._rows.progress() + self._progress_of(first)
        return candidates[: self._num_fitting(running, candidates)]

    def make_way(self) -> None:
        """Send a background request back if an interactive one waits for pages into which its prefix is to be loaded.

        To be called before the batch is formed.
        """
        if self._is_interactive_refused and self._rows.num_interactive < self._rows.num_running:
            self._tenancy.send_back()

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
        are_refused = (each for each in self._to_load if not self._reuse.start_load(each, num_spare=num_growing))
        refused = next((each.waiting.request for each in are_refused), None)
        self._refused = None if refused is None else refused.request_id
        self._is_interactive_refused = refused is not None and not refused.is_background
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

    def _num_fitting(self, running: Progress, candidates: Sequence[Candidate], *, is_shared: bool = True) -> int:
        """How many of the candidates, from the first, fit beside others by the predicted peak of pages.

        Args:
            running: The others.
            candidates: They.
            is_shared: Pages of theirs that running requests have need no room of their own.
        """
        if not candidates:
            return 0
        num_held = np.array([self._pages.num_held(candidate.prefix) for candidate in candidates])
        return num_admissible(
            running,
            self._progress_of(candidates),
            lambda progress: self._policies.expect(self._lengths, progress),
            pools=self._pages.room,
            page_size=self._limits.page_size,
            max_batch_tokens=self._limits.max_batch_tokens,
            num_shared=num_held * is_shared,
            is_all_there=not self._is_loading,
        )

    def _progress_of(self, candidates: Sequence[Candidate]) -> Progress:
        """Lengths of waiting requests."""
        waiting = [candidate.waiting for candidate in candidates]
        num_tokens = np.array([len(each.token_ids) for each in waiting], dtype=np.int64)
        num_generated = np.array([each.num_generated for each in waiting], dtype=np.int64)
        max_tokens = np.array([each.request.max_tokens for each in waiting], dtype=np.int64)
        max_total = np.minimum(num_tokens - num_generated + max_tokens, self._limits.max_model_len)
        return Progress(
            num_tokens=num_tokens,
            num_generated=num_generated,
            max_remaining=max_total - num_tokens,
            is_exact=np.array([each.request.params.ignore_eos for each in waiting], dtype=np.bool_),
            is_background=np.array([each.request.is_background for each in waiting], dtype=np.bool_),
        )
