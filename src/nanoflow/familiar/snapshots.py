"""Copies of outputs that grow in place: of everything so far, or of what is new since the last copy."""

from __future__ import annotations

import dataclasses

from nanoflow.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanoflow.request import RequestOutputKind


class Snapshots:
    """Copies of one output.

    Args:
        kind: Whether a copy has everything so far or what is new since the last one.
    """

    def __init__(self, kind: RequestOutputKind) -> None:
        self._is_delta = kind is RequestOutputKind.DELTA
        # For each completion: copied characters and tokens, and whether its end was copied.
        self._copied: dict[int, tuple[int, int, bool]] = {}
        self._logprobs: dict[int, list[PositionLogprobs]] = {}

    def take(self, output: RequestOutput) -> RequestOutput:
        """Copy an output; in a copy of what is new, completions without anything new are left out."""
        completions = [copy for one in output.outputs if (copy := self._completion(one)) is not None]
        metrics = None if output.metrics is None else dataclasses.replace(output.metrics)
        return dataclasses.replace(output, outputs=completions, metrics=metrics)

    def _completion(self, completion: CompletionOutput) -> CompletionOutput | None:
        index, num_tokens = completion.index, len(completion.token_ids)
        chars, tokens, was_finished = self._copied.get(index, (0, 0, False))
        self._copied[index] = (completion.num_chars, num_tokens, completion.is_finished)
        logprobs = self._rows(completion, num_tokens)
        if not self._is_delta:
            chars = tokens = 0
        elif was_finished or (tokens == num_tokens and chars == completion.num_chars and not completion.is_finished):
            return None
        return CompletionOutput(
            index=index,
            text=completion.text_since(chars),
            token_ids=completion.token_ids[tokens:],
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[tokens:],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )

    def _rows(self, completion: CompletionOutput, num_tokens: int) -> list[PositionLogprobs] | None:
        """The log probabilities so far; each mapping is built only once."""
        if completion.logprobs is None:
            return None
        rows = self._logprobs.setdefault(completion.index, [])
        rows += completion.logprobs[len(rows) : num_tokens]
        return rows
