"""A user's request that has not ended: its completions, times and scores, and its summary when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.engine.completion import Completion
from nanoflow.engine.messages import PlaceLogprobs
from nanoflow.engine.observer import FinishedRequest
from nanoflow.outputs import FinishReason, PromptLogprobRows, RequestMetrics, RequestOutput
from nanoflow.request import SamplingParams


@dataclass(slots=True, kw_only=True)
class LivingRequest:
    """A user's request that has not ended.

    Attributes:
        output: What its user reads; grows in place.
        metrics: Times of the output.
        params: How its tokens are chosen.
        running: Its completions that have not ended, by the engine's id.
        prompt_scores: Log probabilities of its prompt that nobody has read yet.
    """

    output: RequestOutput
    metrics: RequestMetrics
    params: SamplingParams
    running: dict[int, Completion] = field(default_factory=dict)
    prompt_scores: list[PlaceLogprobs] = field(default_factory=list)

    def read_prompt_scores(self) -> None:
        """Move the waiting log probabilities of the prompt to their positions in the output."""
        positions, waiting = self.output.prompt_logprobs, self.prompt_scores
        if not isinstance(positions, PromptLogprobRows):
            return
        self.prompt_scores = []
        for scores in waiting:
            positions.put(scores.first_position, scores.token_ids, scores.logprobs, scores.ranks)

    def count_tokens(self) -> None:
        """Update the number of tokens of all completions in the metrics."""
        self.metrics.num_generation_tokens = sum(len(completion.token_ids) for completion in self.output.outputs)

    def summary(self, reason: FinishReason, now_s: float) -> FinishedRequest:
        """What an observer is told when the request ends at `now_s`."""
        metrics, params = self.metrics, self.params
        lengths = [len(completion.token_ids) for completion in self.output.outputs]
        decode_s = _span_s(metrics.first_token_s, metrics.last_token_s)
        return FinishedRequest(
            reason=reason,
            num_prompt_tokens=len(self.output.prompt_token_ids),
            num_generated_tokens=sum(lengths),
            longest_completion_tokens=max(lengths),
            n=params.n,
            max_tokens=params.max_tokens,
            num_preemptions=metrics.num_preemptions,
            queue_s=_span_s(metrics.arrival_s, metrics.first_scheduled_s),
            prefill_s=_span_s(metrics.first_scheduled_s, metrics.first_token_s),
            decode_s=decode_s,
            inference_s=_span_s(metrics.first_scheduled_s, metrics.last_token_s),
            tpot_s=decode_s / (max(lengths) - 1) if decode_s is not None and max(lengths) > 1 else None,
            e2e_s=now_s - metrics.arrival_s,
        )


def _span_s(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s


def said_ends(output: RequestOutput) -> str:
    """How the completions of a request ended, for the log; without any text of prompts or completions."""
    ends = (f"{len(one.token_ids)} tokens, {one.finish_reason or 'lost'}" for one in output.outputs)
    return "; ".join(ends) + ("" if output.error is None else f" ({output.error})")
