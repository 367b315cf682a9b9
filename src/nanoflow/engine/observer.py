"""`Observer`: is told how fast requests are served; the server's metrics and the benchmarks implement it.

The output processor calls it with plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nanoflow.engine.messages import EngineStats
from nanoflow.outputs import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """A request whose completions have all ended.

    A span of time is None if the request ended (abort, error) before that span.

    Attributes:
        reason: Why the completion that ended last did; "error" if any of them failed.
        num_prompt_tokens: Tokens of the prompt.
        num_generated_tokens: Tokens of all completions together.
        longest_completion_tokens: Tokens of the longest completion.
        n: Completions asked for.
        max_tokens: As asked for; None means up to the context length.
        num_preemptions: How often one of its completions was preempted.
        queue_s: Arrival to admission.
        prefill_s: Admission to first token.
        decode_s: First token to last.
        inference_s: Admission to last token.
        tpot_s: `decode_s` / (`longest_completion_tokens` - 1); None with fewer than two tokens.
        e2e_s: Arrival to end.
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    longest_completion_tokens: int
    n: int
    max_tokens: int | None
    num_preemptions: int
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    inference_s: float | None
    tpot_s: float | None
    e2e_s: float


class Observer(Protocol):
    """Is told what happens to requests. Methods run in the thread that processes outputs: be quick and do not raise."""

    def observe_step(self, stats: EngineStats) -> None:
        """An iteration has ended."""

    def observe_first_token(self, ttft_s: float, num_prompt_tokens: int) -> None:
        """A request got the first token of any of its completions; called once a request."""

    def observe_tokens(self, num_tokens: int) -> None:
        """An iteration generated so many tokens of all requests together; every token is counted in one call."""

    def observe_next_tokens(self, latencies_s: Sequence[float]) -> None:
        """Completions got tokens that are not their first: for each, the seconds since the token before it."""

    def observe_finished(self, request: FinishedRequest) -> None:
        """A request ended, whatever the reason."""
