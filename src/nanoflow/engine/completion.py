"""One completion of a prompt as it grows: which of its tokens have become text, and where that ends.

Tokens come in at every iteration; their text is made when it is read. `output.py` says when.
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
        engine_id: The engine's name of it.
        request_output: What it is part of.
        metrics: Times of that.
        output: What users read; grows in place.
        params: Of the request.
        detokenizer: None if there is no text.
        stops: None if there are no stop strings.
        marks: What goes into the search for stop strings for a token that is left out of the text, by its id.
        logprobs: The log probabilities of the output; None unless asked for.

    Attributes:
        name: Of the request, as its user knows it.
        last_token_s: When the last token came; None before the first.
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
        # The list of the output: `output.py` appends to it, once a token.
        self.token_ids = output.token_ids
        self._params = params
        self._detokenizer = detokenizer
        self._marks = marks
        self._logprobs = logprobs
        # Tokens from here on wait to become text.
        self._num_read = 0

    def add_scores(self, scores: PlaceLogprobs) -> None:
        """Take the log probabilities of the tokens that came last, without those behind a stop string."""
        rows = self._logprobs
        if rows is None:
            return
        for token_ids, logprobs, rank in zip(scores.token_ids, scores.logprobs, scores.ranks, strict=True):
            if len(rows) < len(self.token_ids):
                rows.add(token_ids, logprobs, rank)
                self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + logprobs[0]

    def refresh(self) -> None:
        """Bring the text up to the tokens; with stop strings it already is."""
        num_tokens = len(self.token_ids)
        if num_tokens > self._num_read:
            self._read(num_tokens)

    def find_stop(self, end: Finished | None) -> bool:
        """Look for stop strings in what the waiting tokens add to the text, one token after the other.

        One that is complete within the first `min_tokens` tokens is passed by, one that goes on behind them is not.

        Args:
            end: Why the completion ends with these tokens; None if it does not.

        Returns:
            True if the completion ends here: one was found, and the token that completed it is the last.
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
        """Complete the output: all of its text, and the reason."""
        output, stops = self.output, self.stops
        found = None if stops is None else stops.found
        if found is None:
            self._read(self._num_shown(end))
            rest = "" if self._detokenizer is None else self._detokenizer.flush()
            output.append_text(rest if stops is None else stops.push(rest, may_stop=False) + stops.flush())
        # A string takes less memory than the buffer of a text that grows.
        output.text = output.text
        output.finish_reason = end.reason
        output.stop_reason = found if end.stop_token_id is None else end.stop_token_id

    def fail(self, end: Finished) -> None:
        """End the output as it is: no more text can be made of it."""
        self.output.text = self.output.text
        self.output.finish_reason = end.reason

    def _num_shown(self, end: Finished | None) -> int:
        """Number of tokens that are part of the text: a stop token ends it and is not, unless asked for."""
        hides = end is not None and end.reason is FinishReason.STOP and not self._params.include_stop_str_in_output
        return len(self.token_ids) - hides

    def _read(self, num_tokens: int) -> None:
        """Make text of the waiting tokens up to this number."""
        if self._detokenizer is None or num_tokens <= self._num_read:
            return
        piece = self._detokenizer.push(self.token_ids[self._num_read : num_tokens])
        self._num_read = num_tokens
        self.output.append_text(piece)
