"""The batch shapes that a workload produces, and the range of batches on which a plan for one of them is worth running.

In the steady state the budget is full of decodes and of the prompts that replace finished requests; before it there are
fewer decodes, after it decodes alone, fewer and fewer. Batches of prompts alone have nothing to overlap. A plan cuts
the batch at absolute places, so it wins on batches like its own and may lose on others: how far it reaches is asked of
the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanEntry
from nanoflow.plan.plan import PipelinePlan

# Decodes in a full batch, as a part of those in the steady state; that one first.
_STAGES = (1.0, 0.75, 0.5, 1.25)
_LEAST_DECODES = 256
# What a plan must be predicted to win wherever it is used, and how its range is felt out.
_LEAST_GAIN = 1.01
_SHARE_STEP, _CONTEXT_FACTOR, _TOKEN_STEP = 0.01, 1.03, 32

# Time of a sequential iteration of a batch / time of it under the plan.
Gain = Callable[[BatchShape], float]


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
) -> Iterator[BatchShape]:
    """What a workload of these mean lengths produces: full batches, the steady state first, then decodes alone."""
    context = prompt_tokens + output_tokens / 2
    steady = min(round(max_batch_tokens * output_tokens / (prompt_tokens + output_tokens)), max_num_seqs)
    for part in _STAGES:
        num_decodes = round(steady * part)
        if num_decodes <= min(max_num_seqs, max_batch_tokens):
            yield batch_of(max_batch_tokens, num_decodes, context, prompt_tokens)
    num_tokens = min(max_batch_tokens, max_num_seqs)
    while num_tokens >= _LEAST_DECODES:
        yield batch_of(num_tokens, num_tokens, context, prompt_tokens)
        num_tokens //= 2


def entry_of(plan: PipelinePlan, shape: BatchShape, prompt_tokens: float, gain: Gain) -> PlanEntry | None:
    """The plan with the range of batches on which it wins by 1 %; None if it does not win on its own shape.

    Args:
        plan, shape: A plan, and the batch it was searched for.
        prompt_tokens: Mean length of the prompts among the batch's other tokens.
        gain: The plan's.
    """
    num_tokens, share = shape.num_tokens, shape.num_decode_tokens / shape.num_tokens
    context = shape.decode_context / max(shape.num_decode_tokens, 1)

    def wins(tokens: float = num_tokens, part: float = share, keys: float = context) -> bool:
        if not (0 < part <= 1 and 0 < tokens <= num_tokens):
            return False
        batch = batch_of(round(tokens), round(tokens * part), keys, prompt_tokens)
        return batch.num_decode_tokens > 0 and gain(batch) >= _LEAST_GAIN

    if not wins():
        return None
    # 1. Each range alone, with the others in the middle.
    shares = (
        _reach(share, lambda part: part - _SHARE_STEP, lambda part: wins(part=part)),
        _reach(share, lambda part: min(part + _SHARE_STEP, 1.0), lambda part: wins(part=part)),
    )
    contexts = (
        _reach(context, lambda keys: keys / _CONTEXT_FACTOR, lambda keys: wins(keys=keys)),
        _reach(context, lambda keys: keys * _CONTEXT_FACTOR, lambda keys: wins(keys=keys)),
    )
    tokens = _reach(float(num_tokens), lambda count: count - _TOKEN_STEP, lambda count: wins(tokens=count))
    # 2. At the corners two deviations add up: halfway they mostly do not.
    return PlanEntry(
        plan=plan,
        min_tokens=max(round((tokens + num_tokens) / 2), 1),
        max_tokens=num_tokens,
        min_decode_share=(shares[0] + share) / 2,
        max_decode_share=(shares[1] + share) / 2 if shares[1] < 1 else 1.0,
        min_decode_context=(contexts[0] + context) / 2,
        max_decode_context=(contexts[1] + context) / 2,
    )


def _reach(start: float, step: Callable[[float], float], wins: Callable[[float], bool]) -> float:
    """The last value on the way that wins; at most twenty steps."""
    value = start
    for _ in range(20):
        following = step(value)
        if following == value or not wins(following):
            break
        value = following
    return value
