"""The batch shapes that a workload produces, each with the range of batches that a plan for it is used on.

In the steady state the budget is full of decodes and of the prompts that replace finished requests; while the last
requests end there are decodes alone, fewer and fewer. Batches of prompts alone have nothing to overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanEntry
from nanoflow.plan.plan import PipelinePlan

# A plan cuts at absolute places, so it is for batches down to this part of its own.
_LEAST_PART = 7 / 8
# How far the decode share of a batch may be from that of the plan.
_SHARE_MARGIN = 0.15
_DECODES_ALONE = 0.97
_LEAST_DECODES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRange:
    """A batch shape to search a plan for, and the decode shares the plan is good for."""

    shape: BatchShape
    min_decode_share: float
    max_decode_share: float

    def entry(self, plan: PipelinePlan) -> PlanEntry:
        """The plan as an entry of a book."""
        num_tokens = self.shape.num_tokens
        return PlanEntry(
            plan=plan,
            min_tokens=max(round(num_tokens * _LEAST_PART), 1),
            max_tokens=num_tokens,
            min_decode_share=self.min_decode_share,
            max_decode_share=self.max_decode_share,
        )


def batch_of(num_tokens: int, num_decodes: int, decode_context: float, prompt_tokens: float) -> BatchShape:
    """A batch of so many decodes with a mean context, the rest prompts of a mean length, whole and causal."""
    num_prefill = num_tokens - num_decodes
    return BatchShape(
        num_tokens=num_tokens,
        num_decode_tokens=num_decodes,
        decode_context=round(num_decodes * decode_context),
        prefill_context=round(num_prefill * (prompt_tokens + 1) / 2),
        prefill_kv_tokens=num_prefill,
        num_sampled=min(num_decodes + round(num_prefill / max(prompt_tokens, 1)), num_tokens),
    )


def workload_shapes(
    prompt_tokens: float, output_tokens: float, *, max_batch_tokens: int, max_num_seqs: int
) -> Iterator[ShapeRange]:
    """What a workload of these mean lengths produces: the steady state first, then decodes alone, largest first."""
    context = prompt_tokens + output_tokens / 2
    share = output_tokens / (prompt_tokens + output_tokens)
    num_decodes = min(round(max_batch_tokens * share), max_num_seqs)
    share = num_decodes / max_batch_tokens
    yield ShapeRange(
        shape=batch_of(max_batch_tokens, num_decodes, context, prompt_tokens),
        min_decode_share=max(share - _SHARE_MARGIN, 0.0),
        max_decode_share=min(share + _SHARE_MARGIN, 1.0),
    )
    num_tokens = min(max_batch_tokens, max_num_seqs)
    while num_tokens >= _LEAST_DECODES:
        yield ShapeRange(
            shape=batch_of(num_tokens, num_tokens, context, prompt_tokens),
            min_decode_share=_DECODES_ALONE,
            max_decode_share=1.0,
        )
        num_tokens //= 2
