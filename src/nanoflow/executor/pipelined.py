"""The pipelined executor: runs any valid plan, nano-operation by nano-operation, in the order in which it issues them.

Which stream a nano-operation is queued on and what it waits for there is `lanes.py`'s; on a CPU they run in plan order,
which `PipelinePlan.validate` has proven to respect every dependency. Tensors are allocated once, for the largest batch,
and share memory as far as the plans allow (`plan/liveness.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from nanoflow.executor.buffers import DeviceModel, Workspace
from nanoflow.executor.lanes import Partitions, open_lanes
from nanoflow.executor.steps import Step, bind
from nanoflow.kernels.launch import BatchInputs
from nanoflow.plan.plan import PipelinePlan, PlanError


class PipelinedExecutor:
    """Runs batches of one model under the plans it was given.

    Raises:
        PlanError: A plan does not fit the model.
        LaneError: The device cannot be divided as a plan asks for.
    """

    def __init__(
        self, model: DeviceModel, plans: tuple[PipelinePlan, ...], *, max_batch_tokens: int, max_logits: int
    ) -> None:
        self._model = model
        self.workspace = Workspace.allocate(model, num_tokens=max_batch_tokens, num_logits=max_logits, plans=plans)
        self._steps = {plan.digest: bind(plan, model.graph) for plan in plans}
        self._partitions = Partitions(model.device, model.kernels)
        self._lanes = {
            plan.digest: open_lanes(plan, self._steps[plan.digest], self.workspace, self._partitions) for plan in plans
        }
        self._typical_layers = _typical_layers(model)

    def forward(self, inputs: BatchInputs, plan: PipelinePlan) -> None:
        """Run prologue and layers; `logits` reads what they leave.

        Raises:
            PlanError: The batch is larger than the plan.
        """
        self._run(inputs, plan, enumerate(self._steps[plan.digest]))

    def forward_typical(self, inputs: BatchInputs, plan: PipelinePlan) -> None:
        """`forward` through a few layers that have every kernel between them, so that all are compiled and loaded.

        What it leaves is no result; the next `forward` does not see it.
        """
        steps = enumerate(self._steps[plan.digest])
        self._run(inputs, plan, ((place, step) for place, step in steps if step.layer in self._typical_layers))

    def _run(self, inputs: BatchInputs, plan: PipelinePlan, steps: Iterable[tuple[int, Step]]) -> None:
        """Run the prologue and these steps of the plan, each with its place in it."""
        if inputs.num_tokens > plan.num_tokens:
            raise PlanError(f"plan {plan.name!r} is for {plan.num_tokens} tokens, the batch has {inputs.num_tokens}")
        self.workspace.run_whole(self._model.graph.prologue, inputs)
        lanes = self._lanes[plan.digest]
        with lanes.running():
            for place, step in steps:
                there = inputs.tokens_in(step.op.scope)
                tokens = step.tokens.clip(there.start, there.stop)
                with lanes.on(place) as workspace:
                    if tokens.num_tokens:
                        workspace.run(step.op, step.layer, tokens, inputs)

    def close(self) -> None:
        """Give back the SMs of its lanes, once nothing runs on them and no CUDA graph is left of them."""
        self._partitions.close()

    def logits(self, inputs: BatchInputs) -> Tensor:
        """Logits [S, V] of the rows `inputs.logit_tokens` of the batch just run; overwritten by the next call."""
        return self.workspace.logits(inputs)


def _typical_layers(model: DeviceModel) -> frozenset[int]:
    """Two layers that follow each other, as a plan may overlap them, and the first of each further kind."""
    first_of = {kind.name: layer for layer, kind in reversed(list(enumerate(model.graph.layers)))}
    return frozenset({0, 1, *first_of.values()})
