"""The sizes that the scheduler works with, and the check that refuses a request which could never run.

Only what depends on the model and the page pool is checked here; `nanoflow.request` checks sampling parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanoflow.batch import Int32
from nanoflow.kvcache.sizes import PoolSize, longest_sequence
from nanoflow.parameters import shown
from nanoflow.request import Request, RequestError

# Error code by which clients of OpenAI's API know that they must shorten the prompt or use another model.
CONTEXT_OVERFLOW = "context_length_exceeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Sizes of batch, state table, model and KV cache.

    Attributes:
        max_batch_tokens: Token budget of an iteration.
        max_num_seqs: Rows of the state table: most requests that run at once.
        max_model_len: Most tokens of a request, prompt plus completion.
        num_pages, page_size: The KV cache: pages of its largest pool, and tokens a page.
        group_pools: The pool of each KV group; empty stands for one group, without a window, of `num_pages`.
        vocab_size: Token ids are below this.
        max_sessions: Most sessions whose last pages are remembered; 0 for none.

    Raises:
        ValueError: A size is not positive, `max_sessions` is negative, or a pool cannot hold one request of
            `max_model_len` tokens.
    """

    max_batch_tokens: int
    max_num_seqs: int
    max_model_len: int
    num_pages: int
    page_size: int
    vocab_size: int
    group_pools: tuple[PoolSize, ...] = ()
    max_sessions: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name == "max_sessions" else 1
            if name != "group_pools" and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for pool in self.pools:
            longest = longest_sequence(
                [pool], self.max_model_len, page_size=self.page_size, max_batch_tokens=self.max_batch_tokens
            )
            if longest < self.max_model_len:
                raise ValueError(
                    f"max_model_len ({self.max_model_len}) exceeds the KV cache: {pool.num_pages} pages of "
                    f"{self.page_size} tokens hold {longest}"
                )

    @property
    def pools(self) -> tuple[PoolSize, ...]:
        """The pool of each KV group, at least one."""
        return self.group_pools or (PoolSize(num_pages=self.num_pages),)


def checked_prompt(request: Request, limits: SchedulerLimits) -> Int32:
    """The prompt of a request that can run if it is alone, int32 [num_prompt_tokens].

    Raises:
        RequestError: The prompt is empty or too long, max_tokens is below 1, a token id is out of the vocabulary, or no
            token could be chosen.
    """
    num_prompt = len(request.prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("the prompt is empty", param="prompt")
    if num_prompt >= limits.max_model_len:
        raise RequestError(
            f"This model's maximum context length is {limits.max_model_len} tokens, of prompt and completion together; "
            f"the prompt has {num_prompt} tokens; at most {limits.max_model_len - 1} fit",
            param="prompt",
            code=CONTEXT_OVERFLOW,
        )
    if request.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {request.max_tokens}", param="max_tokens")
    _require_in_vocabulary(request, limits.vocab_size)
    _require_a_choice(request)
    return np.array(request.prompt_token_ids, dtype=np.int32)


def _require_in_vocabulary(request: Request, vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary, except in the model's own end-of-sequence tokens."""
    params = request.params
    for name, ids in (
        ("prompt", request.prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids),
        ("bad_words", [token_id for word in request.bad_word_ids for token_id in word]),
    ):
        low, high = (min(ids), max(ids)) if ids else (0, 0)
        if low < 0 or high >= vocab_size:
            wrong = shown(low if low < 0 else high)
            message = f"{name}: token id {wrong} is out of vocabulary, which has {vocab_size} tokens"
            raise RequestError(message, param=name)


def _require_a_choice(request: Request) -> None:
    """Refuse parameters with which no token could be chosen at the first position."""
    params = request.params
    excluded = {word[0] for word in request.bad_word_ids if len(word) == 1}
    if params.min_tokens:
        excluded.update(request.eos_token_ids, params.stop_token_ids or ())
    # Stops at the first token that can be chosen: the list may be as long as the vocabulary.
    if params.allowed_token_ids is not None and all(token_id in excluded for token_id in params.allowed_token_ids):
        message = "of allowed_token_ids none is left: bad_words, or min_tokens, exclude them all"
        raise RequestError(message, param="allowed_token_ids")
