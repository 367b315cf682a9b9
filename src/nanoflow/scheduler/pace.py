"""How many tokens the next iteration may have: the token budget, or fewer to bound the gap between tokens.

Every running request gets a token from an iteration, so the time of the iteration is the gap that readers see. Chunks
of prompts make it longer, so a bound on the gap limits those chunks. Late in a long prompt a token attends to more
keys, and the same bound allows fewer tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from nanoflow.batch import Int64
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Bounds on the time of iterations; there are none without a prediction of it.

    Attributes:
        max_itl_s: Most seconds of an iteration with decodes, None for any. Decodes of interactive requests are never
            delayed, even if they alone take longer.
        max_ttft_s: Longest time to the first token that background requests may cause (`background.py`), None for any.
        iteration_time: Predicts the time.
        min_prompt_tokens: Prompts advance by at least this many tokens in an iteration, however long it takes.

    Raises:
        ValueError: A bound or the least number of tokens is not positive.
    """

    max_itl_s: float | None = None
    max_ttft_s: float | None = None
    iteration_time: IterationTime | None = None
    min_prompt_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("max_itl_s", "max_ttft_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.min_prompt_tokens < 1:
            raise ValueError(f"min_prompt_tokens must be at least 1, got {self.min_prompt_tokens}")

    def max_tokens(self, max_batch_tokens: int, num_computed: Int64, num_pending: Int64) -> int:
        """Most tokens of the next iteration.

        Tokens that remain when all running requests have theirs are counted as the beginning of a new prompt.

        Args:
            max_batch_tokens: The token budget.
            num_computed: int64 [N], computed tokens of each request, in the order in which requests get tokens: those
                with one pending token (decodes) first.
            num_pending: int64 [N], tokens that each could compute now, at least 1.
        """
        num_decodes = int(np.searchsorted(num_pending, 1, side="right"))
        least = num_decodes + self.min_prompt_tokens
        if self.max_itl_s is None or self.iteration_time is None or num_decodes == 0 or least >= max_batch_tokens:
            return max_batch_tokens
        predict_s = self.iteration_time.predict_s
        decode_context = int(num_computed[:num_decodes].sum()) + num_decodes
        computed = np.append(num_computed[num_decodes:], 0)
        pending = np.append(num_pending[num_decodes:], max_batch_tokens)
        ahead = num_decodes + np.cumsum(pending) - pending

        def time_s(num_tokens: int) -> float:
            taken = np.clip(num_tokens - ahead, 0, pending)
            shape = BatchShape(
                num_tokens=num_tokens,
                num_decode_tokens=num_decodes,
                decode_context=decode_context,
                prefill_context=int((taken * computed + taken * (taken + 1) // 2).sum()),
                num_sampled=num_decodes + int(np.count_nonzero(taken == pending)),
            )
            return predict_s(shape)

        if time_s(max_batch_tokens) <= self.max_itl_s:
            return max_batch_tokens
        allowed = range(least, max_batch_tokens + 1)
        return allowed[max(bisect_right(allowed, self.max_itl_s, key=time_s) - 1, 0)]
