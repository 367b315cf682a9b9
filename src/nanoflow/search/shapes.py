"""The batch shapes that a workload produces, in cells of batches that are alike, and the plan that a cell is worth.

The shapes come from a simulated run, ramp-up and drain included, with the time that each takes. A plan fits a batch by
its size, since it cuts it at fixed places, and by the keys that decodes read for each token of the batch, which is how
much work memory has beside the products. So these two are what cells divide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanEntry
from nanoflow.plan.mechanisms import Measured, Mechanism
from nanoflow.plan.plan import PipelinePlan

# Sizes in a cell differ by this part, no less than a GEMM tile; keys a token by this factor, where they are many.
_TOKEN_STEP, _TOKEN_PART, _KEYS_FACTOR, _MANY_KEYS = 128, 1 / 8, 1.12, 64
# What a plan must win in its cell if a device says so: a trial of a second is off by about 0.4 %
# (docs/log/2026-11-27-lanes-beside-each-other.md).
LEAST_GAIN = 1.005
_NUM_SAMPLES = 6
# Plans that are compared on all batches that stand for a cell, beside the best of each mechanism.
_NUM_COMPARED = 8

# What one iteration of a batch takes under a plan; None: sequentially.
Predict = Callable[[BatchShape, PipelinePlan | None], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Batches that one plan may serve.

    Attributes:
        min_tokens, max_tokens: Their sizes.
        shapes: The batches, those that stand for the others; never empty.
        time_s: What all of them take sequentially.
        decode_share, decode_context: Smallest and largest decode share, and mean context of decodes.
        keys: From so many keys that decodes read for each token to so many; no two cells of a size have any in common.
    """

    min_tokens: int
    max_tokens: int
    shapes: tuple[BatchShape, ...]
    time_s: float
    decode_share: tuple[float, float]
    decode_context: tuple[float, float]
    keys: tuple[float, float]

    @property
    def example(self) -> BatchShape:
        """The median of the batches, by the keys that they read for each token."""
        return self.shapes[len(self.shapes) // 2]

    @property
    def median_batch(self) -> BatchShape:
        """The batch that its plan is searched for: the example, scaled to the largest size of the cell."""
        median = self.example
        scale = self.max_tokens / median.num_tokens
        return BatchShape(
            num_tokens=self.max_tokens,
            num_decode_tokens=min(round(median.num_decode_tokens * scale), self.max_tokens),
            decode_context=round(median.decode_context * scale),
            prefill_context=round(median.prefill_context * scale),
            prefill_kv_tokens=round(median.prefill_kv_tokens * scale),
            num_sampled=min(round(median.num_sampled * scale), self.max_tokens),
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


def cells_of(iterations: Iterable[tuple[BatchShape, float]], max_batch_tokens: int) -> list[Cell]:
    """Iterations of a run, each with the time it takes, in cells; those that take the most time first.

    Batches without decodes are left out: they have nothing to overlap.
    """
    found: dict[tuple[int, int], list[tuple[BatchShape, float]]] = defaultdict(list)
    for shape, time_s in iterations:
        if shape.decode_context:
            step = round(math.log1p(shape.decode_context / shape.num_tokens / _MANY_KEYS) / math.log(_KEYS_FACTOR))
            found[_largest(shape.num_tokens, max_batch_tokens), step].append((shape, time_s))
    cells = [_cell(members, max_tokens, step) for (max_tokens, step), members in found.items()]
    return sorted(cells, key=lambda cell: -cell.time_s)


def _largest(num_tokens: int, max_batch_tokens: int) -> int:
    """The largest size in the cell of a batch of so many tokens."""
    step = max(round(num_tokens * _TOKEN_PART / _TOKEN_STEP), 1) * _TOKEN_STEP
    return min(-(-num_tokens // step) * step, max_batch_tokens)


def _keys(step: float) -> float:
    """Keys a token of a step."""
    return max(_MANY_KEYS * math.expm1(step * math.log(_KEYS_FACTOR)), 0.0)


def _cell(members: Sequence[tuple[BatchShape, float]], max_tokens: int, keys_step: int) -> Cell:
    shapes = sorted((shape for shape, _ in members), key=lambda shape: shape.decode_context / shape.num_tokens)
    step = max(len(shapes) // _NUM_SAMPLES, 1)
    shares = [shape.num_decode_tokens / shape.num_tokens for shape in shapes]
    contexts = [shape.decode_context / shape.num_decode_tokens for shape in shapes]
    return Cell(
        min_tokens=min(shape.num_tokens for shape in shapes),
        max_tokens=max_tokens,
        shapes=tuple(shapes[step // 2 :: step]),
        time_s=sum(time_s for _, time_s in members),
        decode_share=(min(shares), max(shares)),
        decode_context=(min(contexts), max(contexts)),
        keys=(_keys(keys_step - 0.5), _keys(keys_step + 0.5)),
    )


def gain_of(plan: PipelinePlan, cell: Cell, predict: Predict) -> float:
    """Time of the batches that stand for a cell, sequentially / under a plan."""
    sequential_s = sum(predict(shape, None) for shape in cell.shapes)
    return sequential_s / sum(predict(shape, plan) for shape in cell.shapes)


def mechanisms_of(plan: PipelinePlan) -> frozenset[Mechanism]:
    """How its lanes share the device."""
    return frozenset(lane.mechanism for lane in plan.lanes if lane.mechanism.traits.measured is not Measured.NOTHING)


def leading(plans: Sequence[PipelinePlan], count: int) -> list[PipelinePlan]:
    """Of plans in the order of their predictions, the first ones, and the first of every mechanism.

    What is predicted of one mechanism is off by other percents than what is predicted of another. Plans of one name
    divide the device alike and differ in order, by less than predictions are exact to: one of them stands for all.
    """
    named: dict[str, PipelinePlan] = {}
    for plan in plans:
        named.setdefault(plan.name, plan)
    firsts = {mechanisms_of(plan): plan for plan in reversed(named.values())}.values()
    return [plan for place, plan in enumerate(named.values()) if place < count or plan in firsts]


def least_predicted_gain(plan: PipelinePlan, margin: float | None = None) -> float:
    """What a plan must be predicted to win to be used without a trial.

    Args:
        plan: Its lanes say how far off predictions of it may be.
        margin: A part to use in place of the mechanism's own (`plan/mechanisms.py`): 0.02 is 2 %. The result is never
            below the accuracy of a trial.
    """
    if margin is None:
        # The largest margin for a plan that shares the device in no known way.
        margin = max(each.traits.margin for each in mechanisms_of(plan) or Mechanism)
    return max(1.0 + margin, LEAST_GAIN)


def ranked(plans: Iterable[PipelinePlan], cell: Cell, predict: Predict) -> list[tuple[float, PipelinePlan]]:
    """Plans of the cell's size that overlap, each with its gain there, the best one first; of many the promising."""
    fitting = [plan for plan in plans if plan.num_tokens == cell.max_tokens and len(plan.lanes) > 1]
    if len(fitting) > _NUM_COMPARED:
        # One batch is enough to tell which of many plans are not among the best.
        fitting = leading(sorted(fitting, key=lambda plan: predict(cell.example, plan)), _NUM_COMPARED)
    return sorted(((gain_of(plan, cell, predict), plan) for plan in fitting), key=lambda found: -found[0])


def entry_of(plan: PipelinePlan, cell: Cell) -> PlanEntry:
    """The cell with a plan."""
    return PlanEntry(
        plan=plan,
        min_tokens=cell.min_tokens,
        max_tokens=cell.max_tokens,
        min_decode_share=cell.decode_share[0],
        max_decode_share=cell.decode_share[1],
        min_keys=cell.keys[0],
        max_keys=cell.keys[1],
    )
