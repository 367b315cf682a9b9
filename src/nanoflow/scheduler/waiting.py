"""The queue of requests that wait for admission: first come, first served, no overtaking.

A preempted request comes back to the front. The queue does not know what admits a request (`admission.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanoflow.batch import Int32
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

    Args:
        is_ready: Whether a request may run yet. One that may not keeps its place, and others pass it.
    """

    def __init__(self, is_ready: Callable[[Request], bool] = lambda request: True) -> None:
        self._is_ready = is_ready
        self._by_id: OrderedDict[int, WaitingRequest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def push_back(self, waiting: WaitingRequest) -> None:
        """A new request."""
        self._by_id[waiting.request.request_id] = waiting

    def push_front(self, waiting: WaitingRequest) -> None:
        """A preempted request: it goes before all others."""
        self.push_back(waiting)
        self._by_id.move_to_end(waiting.request.request_id, last=False)

    def discard(self, request_id: int) -> bool:
        """Forget a request; False if it is not here."""
        return self._by_id.pop(request_id, None) is not None

    def __iter__(self) -> Iterator[WaitingRequest]:
        """Those that may run, from the first on; the queue may not change meanwhile."""
        return (each for each in self._by_id.values() if self._is_ready(each.request))
