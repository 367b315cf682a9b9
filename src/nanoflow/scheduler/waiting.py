"""The queue of requests that wait for admission: the most urgent first, of these first come, first served.

A preempted request comes back before all others of its priority. The queue does not know what admits a request
(`admission.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanoflow.batch import Int32
from nanoflow.priorities import BATCH, rank_of
from nanoflow.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """A request without a row.

    Attributes:
        request: As it was added.
        token_ids: int32 [num_tokens], the prompt, then what was generated before a preemption.
        num_computed: Tokens whose keys and values need not be computed, whatever its pages hold: for benchmarks.
        page_keys: Of each page that its tokens fill (`kvcache/keys.py`); none if it shares no pages.
        is_preempted: It has run before.
    """

    request: Request
    token_ids: Int32
    num_computed: int = 0
    page_keys: tuple[bytes, ...] = ()
    is_preempted: bool = False

    @property
    def num_generated(self) -> int:
        """Tokens beyond the prompt."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)


class WaitingQueue:
    """Requests in the order in which they will be admitted; any of them can be removed in constant time.

    Those of lower rank (`Request.rank`) come first, and those of one rank in the order in which they came.

    Args:
        is_ready: Whether a request may run yet. One that may not keeps its place, and others pass it.
    """

    def __init__(self, is_ready: Callable[[Request], bool] = lambda request: True) -> None:
        self._is_ready = is_ready
        # By rank, in increasing order of it, then by id; there is no empty rank.
        self._by_rank: dict[int, OrderedDict[int, WaitingRequest]] = {}
        self._rank_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rank_of)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._rank_of

    @property
    def num_background(self) -> int:
        """How many of them are background requests."""
        return len(self._by_rank.get(rank_of(BATCH), ()))

    def push_back(self, waiting: WaitingRequest) -> None:
        """A new request: it goes behind all others of its rank."""
        request_id, rank = waiting.request.request_id, waiting.request.rank
        if rank not in self._by_rank:
            self._by_rank[rank] = OrderedDict()
            self._by_rank = dict(sorted(self._by_rank.items()))
        self._by_rank[rank][request_id], self._rank_of[request_id] = waiting, rank

    def push_front(self, waiting: WaitingRequest) -> None:
        """A preempted request: it goes before all others of its rank."""
        self.push_back(waiting)
        self._by_rank[waiting.request.rank].move_to_end(waiting.request.request_id, last=False)

    def discard(self, request_id: int) -> bool:
        """Forget a request; False if it is not here."""
        rank = self._rank_of.pop(request_id, None)
        if rank is None:
            return False
        del self._by_rank[rank][request_id]
        if not self._by_rank[rank]:
            del self._by_rank[rank]
        return True

    def __iter__(self) -> Iterator[WaitingRequest]:
        """Those that may run, from the first on; the queue may not change meanwhile."""
        return self.before(None)

    def interactive(self) -> Iterator[WaitingRequest]:
        """The same, without background requests."""
        return self.before(rank_of(BATCH))

    def background(self) -> Iterator[WaitingRequest]:
        """The same, background requests alone."""
        return self._ready(self._by_rank.get(rank_of(BATCH), OrderedDict()))

    def before(self, rank: int | None) -> Iterator[WaitingRequest]:
        """The same, those of lower rank alone; all if it is None."""
        for each, waiting in self._by_rank.items():
            if rank is None or each < rank:
                yield from self._ready(waiting)

    def _ready(self, waiting: OrderedDict[int, WaitingRequest]) -> Iterator[WaitingRequest]:
        return (each for each in waiting.values() if self._is_ready(each.request))
