"""What one iteration takes: its layers under a plan, and what stands before, after and between.

The bridge from a profile to whoever thinks in iterations (a simulated serving run, a command). How a layer is
predicted stands in `simulate.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.mxfp4 import in_mxfp4
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import BatchShape, Resource
from nanoflow.graph.shard import Exchange, shard
from nanoflow.models.config_json import parse
from nanoflow.models.moe import with_skew
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.host_link import NO_COPIES, Copies, copies_of
from nanoflow.profile.interference import Interference, lane_of
from nanoflow.profile.operation_cost import operation_cost
from nanoflow.profile.table import NO_COST, SAMPLING, Cost, CostTable, Profile, ProfileError
from nanoflow.simulate.layer import PlanSimulator, Simulation, next_multiple
from nanoflow.timeline.timeline import Timeline, with_copies

# Contexts are rounded to so many significant digits, so that iterations which hardly differ are predicted once.
_CONTEXT_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One iteration of a batch.

    Attributes:
        makespan_s: Of one layer in the steady state.
        iteration_s: All layers, what stands around them, sampling and gaps.
        tokens_per_s_per_gpu: Tokens of the batch / iteration / GPUs.
        energy_per_token_j: Of all GPUs; None if unknown.
        copies_s: How long KV pages are copied beside it; 0 where nothing is below the KV cache.
        simulation: The layers.
    """

    makespan_s: float
    iteration_s: float
    tokens_per_s_per_gpu: float
    energy_per_token_j: float | None
    copies_s: float
    simulation: Simulation


def graphs_of(profile: Profile) -> tuple[OpGraph, ...]:
    """The graphs that a profile has every operation of: one, or one for each way to exchange between GPUs.

    Raises:
        ProfileError: There is none.
    """
    graph = build_graph(parse(profile.config, origin=profile.model), None).with_kv_type(profile.kv_cache_dtype)
    graph = with_skew(graph, profile.expert_skew)
    graph = in_fp8(graph) if profile.is_fp8 else graph
    graph = in_mxfp4(graph) if profile.is_mxfp4 else graph
    graph = fuse_swiglu(graph) if profile.is_fused else graph
    measured = {point.operation for point in profile.points}
    found = {shard(graph, profile.setup.num_gpus, exchange): None for exchange in Exchange}
    complete = [each for each in found if {op.key for op in each.operations()} <= measured]
    if not complete:
        names = sorted({op.key for each in found for op in each.operations()} - measured)
        raise ProfileError(f"the profile of {profile.model} has no point of {', '.join(names)}")
    return tuple(complete)


class IterationModel:
    """Predicts iterations of the plans of a book.

    Args:
        profile: What operations take.
        book: The plans; every batch runs sequentially without one.
        copies: Of KV pages, beside every iteration.

    Raises:
        ProfileError, PlanError: The profile lacks an operation, or a plan does not fit its graph.
    """

    def __init__(self, profile: Profile, book: PlanBook | None = None, copies: Copies = NO_COPIES) -> None:
        self.profile, self._copies = profile, copies
        self.graph = graphs_of(profile)[0]
        self._table = CostTable(profile, self.graph)
        self._interference = Interference(profile, self.graph)
        self._book = book
        self._simulators: dict[str, PlanSimulator] = {}
        self._known: dict[tuple[str, BatchShape], Cost] = {}
        self._chosen_s: dict[BatchShape, float] = {}

    def cost(self, shape: BatchShape) -> Cost:
        """Time of one iteration, and its energy on one GPU."""
        shape = _rounded(shape)
        plan = self._choose(shape)
        key = (plan.digest, shape)
        if key not in self._known:
            self._known[key] = self._with_layers(self._layers(plan, shape), shape)
        return self._known[key]

    def predict(self, shape: BatchShape, plan: PipelinePlan | None = None) -> Prediction:
        """One iteration of a batch under a plan; None: what the book chooses."""
        simulation = self._simulate(plan or self._choose(shape), shape)
        cost = self._with_layers(self._simulated_layers(simulation), shape)
        num_gpus = self.profile.setup.num_gpus
        return Prediction(
            makespan_s=simulation.period_s,
            iteration_s=cost.time_s,
            tokens_per_s_per_gpu=shape.num_tokens / cost.time_s / num_gpus,
            energy_per_token_j=None if cost.energy_j is None else cost.energy_j * num_gpus / shape.num_tokens,
            copies_s=self._copies.lane_s(shape.num_tokens),
            simulation=simulation,
        )

    def iteration_s(self, shape: BatchShape, plan: PipelinePlan | None = None) -> float:
        """Time of that iteration; of what the book chooses it is kept, as many plans are compared with it."""
        if plan is not None:
            return self.predict(shape, plan).iteration_s
        if shape not in self._chosen_s:
            self._chosen_s[shape] = self.predict(shape).iteration_s
        return self._chosen_s[shape]

    def busy_s(self, shape: BatchShape) -> dict[Resource, float]:
        """How long the layers of an iteration take sequentially, by the resource in whose lane operations run."""
        tokens = TokenRange(start=0, stop=shape.num_tokens)
        found: dict[Resource, float] = defaultdict(float)
        for kind, count in self.graph.kind_counts:
            for op in kind.operations:
                found[lane_of(op)] += operation_cost(op, tokens, shape, self._table).time_s * count
        return found

    def simulate(self, plan: PipelinePlan, shape: BatchShape, num_layers: int) -> Simulation:
        """So many layers under a plan."""
        return self._simulator(plan).run(shape, num_layers)

    def _choose(self, shape: BatchShape) -> PipelinePlan:
        if self._book is None:
            return self._sequential(shape.num_tokens)
        return self._book.choose(shape)

    def _sequential(self, num_tokens: int) -> PipelinePlan:
        return sequential_plan(self.graph, num_tokens)

    def _simulate(self, plan: PipelinePlan, shape: BatchShape) -> Simulation:
        return self._simulator(plan).run(shape)

    def _layers(self, plan: PipelinePlan, shape: BatchShape) -> Cost:
        """All layers of an iteration."""
        if self._is_sequential(plan):
            return self._simulator(plan).layer_in_sequence(shape).times(self.graph.num_layers)
        return self._simulated_layers(self._simulate(plan, shape))

    def _is_sequential(self, plan: PipelinePlan) -> bool:
        return len(plan.lanes) == 1 and len(plan.nano_operations) == len(self.graph.layer)

    def _simulator(self, plan: PipelinePlan) -> PlanSimulator:
        # Sequential plans of all sizes are alike: nano-operations are cut to the batch.
        key = plan.name if self._is_sequential(plan) else plan.digest
        if key not in self._simulators:
            plan.validate(self.graph)
            whole = plan if key == plan.digest else self._sequential(_ANY_BATCH)
            self._simulators[key] = PlanSimulator(whole, self.graph, self._table, self._interference)
        return self._simulators[key]

    def _simulated_layers(self, simulation: Simulation) -> Cost:
        ends_s = simulation.layer_ends_s
        num_more = self.graph.num_layers - len(ends_s)
        energy_j = simulation.layer_energy_j
        return Cost(
            time_s=(ends_s[-1] + num_more * simulation.period_s) * simulation.mix,
            energy_j=None if energy_j is None else energy_j * self.graph.num_layers * simulation.mix,
        )

    def _with_layers(self, layers: Cost, shape: BatchShape) -> Cost:
        """The iteration that has these layers, and the copies beside it."""
        alone = sum(self._around(shape), start=layers)
        more_s = self._copies.beside(alone.time_s, shape.num_tokens) - alone.time_s
        return alone + Cost(time_s=more_s, energy_j=more_s * (self.profile.setup.static_power_w or 0.0))

    def _around(self, shape: BatchShape) -> Iterator[Cost]:
        """What is not in a layer."""
        tokens = TokenRange(start=0, stop=shape.num_tokens)
        for op in (*self.graph.prologue, *self.graph.epilogue):
            yield operation_cost(op, tokens, shape, self._table)
        yield self._table.cost(SAMPLING, shape.num_sampled) if self._table.has(SAMPLING) else NO_COST
        static_w = self.profile.setup.static_power_w or 0.0
        gap_s = self.profile.iteration_gap_s
        yield Cost(time_s=gap_s, energy_j=gap_s * static_w)


class Recorded:
    """Predicts as a model does, and keeps what it was asked and said."""

    def __init__(self, model: IterationModel) -> None:
        self.model = model
        self.iterations: list[tuple[BatchShape, float]] = []

    def cost(self, shape: BatchShape) -> Cost:
        """See `IterationModel.cost`."""
        cost = self.model.cost(shape)
        self.iterations.append((shape, cost.time_s))
        return cost


def predict(plan: PipelinePlan | None, profile: Profile, shape: BatchShape) -> Prediction:
    """One iteration of a batch under a plan, or sequentially."""
    return IterationModel(profile).predict(shape, plan)


def predict_timeline(
    plan: PipelinePlan, profile: Profile, shape: BatchShape, num_layers: int, *, kv_host_gib: float = 0.0
) -> Timeline:
    """So many layers of a plan on a batch, from the middle of many, where the pipeline is full.

    The first one is the first of the model's pattern. With host memory below the KV cache each layer has its part of
    the iteration's copies, on a lane of their own.
    """
    model = IterationModel(profile)
    filling = next_multiple(plan.max_stage + 1, len(model.graph.main_pattern))
    timeline = model.simulate(plan, shape, 2 * filling + num_layers + 1).timeline
    shown = [span for span in timeline.spans if filling <= span.layer < filling + num_layers]
    begin_s = min(span.start_s for span in shown)
    spans = tuple(
        replace(span, layer=span.layer - filling, start_s=span.start_s - begin_s, stop_s=span.stop_s - begin_s)
        for span in shown
    )
    lane_s = copies_of(profile, model.graph, host_gib=kv_host_gib).lane_s(shape.num_tokens) / model.graph.num_layers
    return with_copies(replace(timeline, spans=spans), lane_s, shape.num_tokens)


_ANY_BATCH = 1 << 20


def _rounded(shape: BatchShape) -> BatchShape:
    """The shape with contexts rounded."""
    return BatchShape(
        num_tokens=shape.num_tokens,
        num_decode_tokens=shape.num_decode_tokens,
        decode_context=_round(shape.decode_context),
        prefill_context=_round(shape.prefill_context),
        prefill_kv_tokens=_round(shape.prefill_kv_tokens),
        num_sampled=shape.num_sampled,
    )


def _round(value: int) -> int:
    return int(float(f"{value:.{_CONTEXT_DIGITS}g}"))
