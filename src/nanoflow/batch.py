"""The dense batch of one iteration and its results: the contract between scheduler and executor.

All arrays are numpy: the scheduler fills them without torch, and the executor copies them to its device. Requests with
one token (decodes) come first, so that decode tokens are rows 0..num_decodes-1 of every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nanoflow.graph.operation import BatchShape
from nanoflow.request import SamplingParams
from nanoflow.thinking import ThinkingLimit

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A request that takes a row of the state table in this iteration (newly admitted, or again after preemption).

    Attributes:
        row: Its index in every per-request array until it leaves.
        params: Its sampling parameters.
        seed: Its random seed.
        token_ids: All tokens known so far, int32 [num_tokens]: the prompt, then what was generated before a preemption.
        num_prompt_tokens: How many of them are the prompt.
        stop_token_ids: Tokens that may not be chosen before `min_tokens` (end of sequence and stop tokens).
        bad_word_ids: Forbidden sequences of tokens. The last token of a sequence is not chosen if the others have just
            been generated.
        thinking: The bound on its reasoning; None for none.
    """

    row: int
    params: SamplingParams
    seed: int
    token_ids: Int32
    num_prompt_tokens: int
    stop_token_ids: tuple[int, ...]
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    thinking: ThinkingLimit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScore:
    """A request for log probabilities of prompt tokens, from the logits of tokens start..stop-1 of the batch.

    Attributes:
        request_index: Index of the request in the batch.
        start, stop: Token range in the batch.
        first_position: Index in the prompt of the first entry of `target_ids`.
        target_ids: int32 [stop - start], the prompt token that follows each token of the range.
        num_logprobs: How many of the most probable tokens to report.
    """

    request_index: int
    start: int
    stop: int
    first_position: int
    target_ids: Int32
    num_logprobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPooling:
    """Hidden states of tokens start..stop-1 of the batch, at least one, are a part of a prompt's mean.

    Attributes:
        request_index: Index of the request in the batch.
        start, stop: Token range in the batch.
        is_first, is_last: Whether the mean begins with this range, and ends with it.
        num_pooled: Tokens of the prompt that it is the mean of.
    """

    request_index: int
    start: int
    stop: int
    is_first: bool
    is_last: bool
    num_pooled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPages:
    """Pages added to page tables since the previous batch, as N entries. The tables themselves stay on the device.

    Attributes:
        rows: int32 [N], the table that each one is of: row r of the state table has table r in the first KV group, and
            g * num_rows + r in group g of a model with several.
        columns: int32 [N], which page of its row each one is, from 0; no place twice.
        pages: int32 [N], page ids.
    """

    rows: Int32
    columns: Int32
    pages: Int32

    def __len__(self) -> int:
        """N."""
        return len(self.pages)

    @staticmethod
    def none() -> NewPages:
        """No new pages."""
        return NewPages.of_tables(np.zeros((0, 0), np.int32))

    @staticmethod
    def of_groups(groups: Sequence[NewPages], *, num_rows: int) -> NewPages:
        """Those of several KV groups, each with rows of the state table, which has `num_rows`."""
        if len(groups) == 1:
            return groups[0]
        return NewPages(
            rows=np.concatenate([new.rows + np.int32(group * num_rows) for group, new in enumerate(groups)]),
            columns=np.concatenate([new.columns for new in groups]),
            pages=np.concatenate([new.pages for new in groups]),
        )

    @staticmethod
    def of_tables(tables: Int32) -> NewPages:
        """Whole page tables, int32 [B, P], of the first B rows."""
        rows, columns = np.indices(tables.shape, dtype=np.int32)
        return NewPages(rows=rows.reshape(-1), columns=columns.reshape(-1), pages=tables.reshape(-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBatch:
    """All tokens of one iteration (T tokens, B requests, S of which sample a token; G KV groups, mostly one).

    Attributes:
        iteration: Number of the iteration; it grows.
        rows: int32 [B], the row of each request in the state table.
        epochs: int64 [B], which tenant of the row this is; a token for an earlier tenant is dropped.
        num_decodes: The first so many requests have one token each.
        query_start: int32 [B + 1], where each request's tokens begin.
        context_len: int32 [B], tokens in the cache once this iteration is done.
        token_ids: int32 [T]; where `is_fed_back`, any value.
        is_fed_back: bool [T], the token is the one last sampled for that row; it is on the device only.
        positions: int32 [T], place of each token in its sequence.
        slots: int64 [G * T], place of each token in the KV cache of each group, group after group:
            page * page_size + offset.
        new_pages: What the page tables of these requests have grown by. Batches run in the order in which they were
            formed, so what an earlier tenant has left in a row's table is overwritten or lies behind the pages in use.
        table_width: Columns of the widest page table among these requests.
        sampled: int32 [S], not decreasing: the requests (by place in the batch) that draw a token. One that stands here
            n times draws behind each of its last n tokens; all of them but the first are a draft, that is tokens
            which are only guessed (`scheduler/drafts.py`). Without drafts no request stands here twice.
        joined: Requests that are new to their row.
        prompt_scores: Prompt log probabilities asked for.
        poolings: Parts of prompts whose vector is asked for, as far as they count for it.
        num_drafted_requests: Requests with a draft (guessed tokens); each of them is named several times in `sampled`.
        num_draft_tokens: Guessed tokens of all these requests together.
    """

    iteration: int
    rows: Int32
    epochs: Int64
    num_decodes: int
    query_start: Int32
    context_len: Int32
    token_ids: Int32
    is_fed_back: Bool
    positions: Int32
    slots: Int64
    new_pages: NewPages
    table_width: int
    sampled: Int32
    joined: tuple[Joined, ...] = ()
    prompt_scores: tuple[PromptScore, ...] = ()
    poolings: tuple[PromptPooling, ...] = ()
    num_drafted_requests: int = 0
    num_draft_tokens: int = 0

    @property
    def num_requests(self) -> int:
        """B, the number of requests."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return len(self.token_ids)

    @property
    def draws_around(self) -> tuple[Int64, Int64]:
        """For each draw, how many draws of the same request precede it and follow it; two arrays int64 [S]."""
        is_first = np.diff(self.sampled, prepend=-1) != 0
        starts = np.flatnonzero(is_first)
        counts = np.diff(np.append(starts, len(self.sampled)))
        num_before = np.arange(len(self.sampled)) - np.repeat(starts, counts)
        return num_before, np.repeat(counts, counts) - 1 - num_before

    @property
    def logit_tokens(self) -> Int64:
        """Index in the batch of the token after which each draw is made, int64 [S]."""
        last = self.query_start[self.sampled + 1].astype(np.int64) - 1
        return last - self.draws_around[1] if self.num_draft_tokens else last

    @property
    def followed_by(self) -> Int32 | None:
        """The token in the batch behind the one after which each draw is made, int32 [S]; None if there are no drafts.

        It means something only where the next draw is of the same request: there it is a token of the draft.
        """
        if not self.num_draft_tokens:
            return None
        followed: Int32 = self.token_ids[np.minimum(self.logit_tokens + 1, self.num_tokens - 1)]
        return followed

    @property
    def drawn_positions(self) -> Int32:
        """Index in its sequence of each token that is drawn, int32 [S]."""
        if not self.num_draft_tokens:
            return self.context_len[self.sampled]
        positions: Int32 = self.positions[self.logit_tokens] + np.int32(1)
        return positions

    @property
    def shape(self) -> BatchShape:
        """The sizes that the cost of this batch depends on."""
        lengths = np.diff(self.query_start)[self.num_decodes :].astype(np.int64)
        contexts = self.context_len[self.num_decodes :].astype(np.int64)
        return BatchShape(
            num_tokens=self.num_tokens,
            num_decode_tokens=self.num_decodes,
            decode_context=int(self.context_len[: self.num_decodes].sum()),
            prefill_context=int((lengths * contexts - lengths * (lengths - 1) // 2).sum()),
            prefill_kv_tokens=int(contexts.sum()),
            num_sampled=len(self.sampled),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs:
    """Log probabilities at N positions: column 0 is the token at the position, then the K most probable tokens.

    Attributes:
        token_ids: int32 [N, 1 + K].
        logprobs: float32 [N, 1 + K], natural logarithms.
        ranks: int32 [N], rank of the token at the position, from 1.
    """

    token_ids: Int32
    logprobs: Float32
    ranks: Int32

    @staticmethod
    def concatenate(parts: Sequence[TopLogprobs]) -> TopLogprobs:
        """The positions of all parts, one after the other."""
        return TopLogprobs(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            ranks=np.concatenate([part.ranks for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """The results of one iteration.

    Attributes:
        token_ids: int32 [S], in the order of `DenseBatch.sampled`.
        logprob_places: The N draws of requests that asked for log probabilities: index in `sampled`, and how many of
            the most probable tokens were asked for.
        logprobs: Log probabilities of these N draws, K being the largest number asked for; None if N = 0.
        prompt_logprobs: One entry for each of `DenseBatch.prompt_scores`.
        pooled: float32 [hidden size], one for each of `DenseBatch.poolings` that is the last of its prompt.
        errors: For each draw that failed, its index in `sampled` and the reason, such as logits that are not finite.
            The other requests are not affected.
    """

    token_ids: Int32
    logprob_places: Sequence[tuple[int, int]] = ()
    logprobs: TopLogprobs | None = None
    prompt_logprobs: tuple[TopLogprobs, ...] = ()
    pooled: tuple[Float32, ...] = ()
    errors: dict[int, str] = field(default_factory=dict)
