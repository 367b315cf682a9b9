"""One completion of a prompt as it grows: which of its tokens have become text, and where the text ends.

Tokens arrive with every iteration. Their text is made only when it is read; `output.py` decides when.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow.engine.detokenize import Detokenizer
from nanoflow.engine.messages import PlaceLogprobs
from nanoflow.engine.stop import StopFilter
from nanoflow.engine.stop_special import MarkedStopFilter
from nanoflow.outputs import CompletionOutput, Finished, FinishReason, LogprobRows, RequestMetrics, RequestOutput
from nanoflow.request import SamplingParams


class Completion:
    """One completion that has not ended: one request of the engine.

    Args:
        engine_id: Id of its request in the engine.
        request_output: The output of the user's request, of which this completion is a part.
        metrics: Times of that output.
        output: What users read; grows in place.
        params: The request's parameters.
        detokenizer: None if there is no text.
        stops: None if there are no stop strings.
        marks: By token id, the character that stands for a token left out of the text when stop strings are searched;
            see `stop_special.py`.
        logprobs: The log probabilities of the output; None unless asked for.

    Attributes:
        name: The user's id of the request.
        last_token_s: Time of the last token; None before the first.
    """

    __slots__ = (
        "_detokenizer",
        "_logprobs",
        "_marks",
        "_num_read",
        "_params",
        "engine_id",
        "last_token_s",
        "metrics",
        "name",
        "output",
        "request_output",
        "stops",
        "token_ids",
    )

    def __init__(
        self,
        *,
        engine_id: int,
        request_output: RequestOutput,
        metrics: RequestMetrics,
        output: CompletionOutput,
        params: SamplingParams,
        detokenizer: Detokenizer | None,
        stops: StopFilter | MarkedStopFilter | None,
        marks: Mapping[int, str],
        logprobs: LogprobRows | None,
    ) -> None:
        self.engine_id = engine_id
        self.name = request_output.request_id
        self.request_output = request_output
        self.metrics = metrics
        self.output = output
        self.stops = stops
        self.last_token_s: float | None = None
        # The list of the output; `output.py` appends every token to it.
        self.token_ids = output.token_ids
        self._params = params
        self._detokenizer = detokenizer
        self._marks = marks
        self._logprobs = logprobs
        # Tokens from this index on have not become text yet.
        self._num_read = 0

    def add_scores(self, scores: PlaceLogprobs) -> None:
        """Add the log probabilities of the last tokens, except of tokens after a stop string."""
        rows = self._logprobs
        if rows is None:
            return
        for token_ids, logprobs, rank in zip(scores.token_ids, scores.logprobs, scores.ranks, strict=True):
            if len(rows) < len(self.token_ids):
                rows.add(token_ids, logprobs, rank)
                self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + logprobs[0]

    def refresh(self) -> None:
        """Make text of all waiting tokens. With stop strings there are none: `find_stop` makes the text."""
        num_tokens = len(self.token_ids)
        if num_tokens > self._num_read:
            self._read(num_tokens)

    def find_stop(self, end: Finished | None) -> bool:
        """Look for stop strings in the text of the waiting tokens, one token after the other.

        A stop string that is complete within the first `min_tokens` tokens is ignored.

        Args:
            end: How the engine ended the completion with these tokens; None if it did not.

        Returns:
            True if a stop string was found: the completion ends with the token that completed it.
        """
        stops, detokenizer, min_tokens = self.stops, self._detokenizer, self._params.min_tokens
        if stops is None or detokenizer is None:
            return False
        num_shown = len(self.token_ids) if end is None else self._num_shown(end)
        for num_tokens, token_id in enumerate(self.token_ids[self._num_read : num_shown], start=self._num_read + 1):
            piece = self._marks.get(token_id) or detokenizer.push((token_id,))
            piece = stops.push(piece, may_stop=num_tokens > min_tokens)
            if piece:
                self.output.append_text(piece)
            if stops.found is not None:
                del self.token_ids[num_tokens:]
                break
        self._num_read = len(self.token_ids)
        return stops.found is not None

    def finish(self, end: Finished) -> None:
        """Complete the output with all of its text and the finish reason."""
        output, stops = self.output, self.stops
        found = None if stops is None else stops.found
        if found is None:
            self._read(self._num_shown(end))
            rest = "" if self._detokenizer is None else self._detokenizer.flush()
            output.append_text(rest if stops is None else stops.push(rest, may_stop=False) + stops.flush())
        # Replace the growing buffer by a string, which takes less memory.
        output.text = output.text
        output.finish_reason = end.reason
        output.stop_reason = found if end.stop_token_id is None else end.stop_token_id

    def fail(self, end: Finished) -> None:
        """End the output with the text that it has, because no more text can be made."""
        self.output.text = self.output.text
        self.output.finish_reason = end.reason

    def _num_shown(self, end: Finished | None) -> int:
        """Number of tokens that are part of the text. A stop token is not, unless the parameters ask for it."""
        hides = end is not None and end.reason is FinishReason.STOP and not self._params.include_stop_str_in_output
        return len(self.token_ids) - hides

    def _read(self, num_tokens: int) -> None:
        """Make text of the waiting tokens up to this number."""
        if self._detokenizer is None or num_tokens <= self._num_read:
            return
        piece = self._detokenizer.push(self.token_ids[self._num_read : num_tokens])
        self._num_read = num_tokens
        self.output.append_text(piece)
