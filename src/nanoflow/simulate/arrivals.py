"""Requests of simulated runs: what each asks for and when it comes.

Here are those that know nothing of each other; the rounds of conversations, which come when the one before has ended,
are in `talking.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.priorities import Priority
from nanoflow.request import Request, SamplingParams
from nanoflow.workload import Lengths

# All tokens of completions are 0 but the last, which ends them where their length is not known before.
OTHER, END = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request.

    Attributes:
        request_id: From 0 on, unique in the run.
        prompt_token_ids: Its prompt.
        num_output_tokens: Tokens of its completion.
        arrival_s: When it comes.
        num_computed: Tokens of its prompt that count as computed.
        root: Requests with the same root and tokens share pages (`kvcache/keys.py`); empty if it shares none.
        thread: Requests of one thread go to one replica; None if it may go to any.
        priority: As of `Request`.
    """

    request_id: int
    prompt_token_ids: list[int] = field(repr=False)
    num_output_tokens: int
    arrival_s: float
    num_computed: int = 0
    root: bytes = b""
    thread: int | None = None
    priority: Priority = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and completion."""
        return len(self.prompt_token_ids) + self.num_output_tokens

    def as_request(self, *, max_tokens: int | None, max_model_len: int, page_size: int) -> Request:
        """As the scheduler gets it; its seed is its id, by which a batch names it.

        Args:
            max_tokens: Most tokens that it allows, at least those that it gets; None: exactly those, and the scheduler
                knows that.
            max_model_len: Most tokens of prompt and completion.
            page_size: Tokens a page.
        """
        is_exact = max_tokens is None
        most = self.num_output_tokens if max_tokens is None else max(max_tokens, self.num_output_tokens)
        keys = (self.root, *page_keys(self.prompt_token_ids, page_size, self.root)) if self.root else ()
        return Request(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            params=SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=is_exact),
            seed=self.request_id,
            max_tokens=min(most, max_model_len - len(self.prompt_token_ids)),
            eos_token_ids=() if is_exact else (END,),
            arrival_s=self.arrival_s,
            page_keys=b"".join(keys),
            priority=self.priority,
        )


class Arrivals(Protocol):
    """Requests in the order in which they come; some come only when others have ended."""

    @property
    def num_requests(self) -> int:
        """Of the whole run."""

    @property
    def next_s(self) -> float | None:
        """When the next one comes; None if none does before another one ends."""

    def take(self) -> Asked:
        """The next one."""

    def finish(self, request_id: int, now_s: float) -> None:
        """A request has ended."""


class Independent:
    """Requests that do not depend on each other.

    Args:
        lengths: Of each.
        arrivals_s: When each comes, in increasing order.
        has_keys: Each has pages that it finds again itself, after it was sent back to the queue.
    """

    def __init__(self, lengths: Sequence[Lengths], arrivals_s: Sequence[float], *, has_keys: bool = False) -> None:
        self._has_keys = has_keys
        self._coming = deque(enumerate(zip(lengths, arrivals_s, strict=True)))
        self.num_requests = len(lengths)

    @property
    def next_s(self) -> float | None:
        """See `Arrivals`."""
        return self._coming[0][1][1] if self._coming else None

    def take(self) -> Asked:
        """See `Arrivals`."""
        request_id, (length, arrival_s) = self._coming.popleft()
        return Asked(
            request_id=request_id,
            prompt_token_ids=[OTHER] * length.num_prompt_tokens,
            num_output_tokens=length.num_output_tokens,
            arrival_s=arrival_s,
            num_computed=length.num_computed,
            root=root_key(str(request_id)) if self._has_keys else b"",
        )

    def finish(self, request_id: int, now_s: float) -> None:
        """See `Arrivals`."""
