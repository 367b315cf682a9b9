"""Rows whose completion must match a grammar: which tokens they may choose next, as bit masks.

A row's mask depends on its last token. So a mask is computed on the host while the device runs the layers of the
iteration that draws with it: `masks` waits for the tokens of the iteration before, which the device has finished by
then, and all other work stays queued ahead. Rows without a grammar cost nothing, and without any such row nothing
waits.

Legend: R rows of the state table, V vocabulary, S draws, M draws with a mask, W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import consume_token_par, fill_next_token_bitmask_par
from torch import Tensor

from nanoflow.batch import Bool, Int32, Joined
from nanoflow.device.transfer import Readback, to_device
from nanoflow.grammars.compiled import Grammars
from nanoflow.grammars.text import GrammarError, said

_MAX_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """What the draws of an iteration may choose.

    Attributes:
        numbers: int32 [S], 1 + the row in `words` of each draw's mask; 0 for a draw without one.
        words: int32 [M, W], as in `SampleTables.masks`.
        must_end: bool [S], the draw may choose nothing but an end of sequence.
        errors: Message by draw whose grammar has failed.
    """

    numbers: Int32
    words: Tensor
    must_end: Bool
    errors: dict[int, str] = field(default_factory=dict)


class Constraints:
    """Matchers of rows with a grammar.

    Args:
        num_rows: R.
        vocab_size: V.
        device: Where masks are used.
        grammars: Compiles them; None if no request may have one.
    """

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device, grammars: Grammars | None) -> None:
        self._device, self._grammars = device, grammars
        self._num_words = -(-vocab_size // 32)
        self._matchers: dict[int, LLMatcher] = {}
        self._has_matcher = np.zeros(num_rows, np.bool_)
        self._pending: tuple[list[int], list[LLMatcher], Readback] | None = None
        self._none = torch.zeros((1, self._num_words), dtype=torch.int32, device=device)
        self._threads: LLExecutor | None = None

    def join(self, joined: Sequence[Joined]) -> dict[int, str]:
        """Assign rows to requests; returns a message by row for those whose grammar has failed."""
        errors: dict[int, str] = {}
        for request in joined:
            self._matchers.pop(request.row, None)
            structured = request.params.structured_outputs
            if structured is not None:
                try:
                    if self._grammars is None:
                        raise GrammarError("structured output needs a tokenizer")
                    self._matchers[request.row] = self._begun(self._grammars.matcher(structured), request)
                except GrammarError as error:
                    errors[request.row] = f"its structured output failed: {error}"
            self._has_matcher[request.row] = request.row in self._matchers
        return errors

    def masks(self, rows: Int32) -> Masks:
        """The masks of draws of these rows (int32 [S]), after the tokens noted last."""
        self._take_in()
        numbers, must_end = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.bool_)
        places = np.flatnonzero(self._has_matcher[rows]).tolist()
        if not places:
            return Masks(numbers=numbers, words=self._none, must_end=must_end)
        matchers = [self._matchers[int(rows[place])] for place in places]
        words = np.zeros((len(places), self._num_words), np.int32)
        fill_next_token_bitmask_par(self._executor, [(each, i) for i, each in enumerate(matchers)], words)
        numbers[places] = 1 + np.arange(len(places))
        must_end[places] = [each.is_stopped() for each in matchers]
        return Masks(
            numbers=numbers,
            words=to_device(words, self._device),
            must_end=must_end,
            errors={
                place: f"its structured output failed: {said(each.get_error())}"
                for place, each in zip(places, matchers, strict=True)
                if each.is_error()
            },
        )

    def note(self, rows: Int32, token_ids: Tensor) -> None:
        """Remember the tokens (int64 [S]) just drawn for these rows (int32 [S]), without waiting for them."""
        places = np.flatnonzero(self._has_matcher[rows])
        if len(places):
            drawn, drawing = token_ids[to_device(places, self._device)], rows[places].tolist()
            self._pending = drawing, [self._matchers[row] for row in drawing], Readback([drawn])

    @property
    def _executor(self) -> LLExecutor:
        """Threads that compute masks, made when the first is needed."""
        if self._threads is None:
            self._threads = LLExecutor(min(_MAX_THREADS, max((os.cpu_count() or 1) // 2, 1)))
        return self._threads

    def _begun(self, matcher: LLMatcher, request: Joined) -> LLMatcher:
        """The matcher behind what was generated before a preemption."""
        matcher.try_consume_tokens(request.token_ids[request.num_prompt_tokens :].tolist())
        return matcher

    def _take_in(self) -> None:
        """Let matchers see the tokens drawn last. A matcher that cannot take its token has failed, and says so."""
        if self._pending is None:
            return
        (rows, matchers, readback), self._pending = self._pending, None
        (token_ids,) = readback.wait()
        were_stopped = [each.is_stopped() for each in matchers]
        consume_token_par(self._executor, list(zip(matchers, token_ids.tolist(), strict=True)))
        for row, matcher, was_stopped in zip(rows, matchers, were_stopped, strict=True):
            # The end of sequence was drawn: what the row draws until another request takes it is dropped.
            has_ended = was_stopped or matcher.stop_reason() == "EndOfSentence"
            if has_ended and self._matchers.get(row) is matcher:
                del self._matchers[row]
                self._has_matcher[row] = False
