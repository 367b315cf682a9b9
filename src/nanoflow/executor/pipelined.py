"""The pipelined executor: runs any valid plan, nano-operation by nano-operation, in the plan's issue order.

`lanes.py` decides on which stream each nano-operation runs and what it waits for there. On a CPU they run in issue
order, which respects every dependency (`PipelinePlan.validate`). Tensors are allocated once, for the largest batch, and
share memory as far as the plans allow (`plan/liveness.py`).
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
    """Runs batches of one model under given plans.

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
        """Run the prologue and all layers; `logits` reads their result.

        Raises:
            PlanError: The batch is larger than the plan.
        """
        self._run(inputs, plan, enumerate(self._steps[plan.digest]))

    def forward_typical(self, inputs: BatchInputs, plan: PipelinePlan) -> None:
        """`forward` through a few layers that together use every kernel, so that all kernels are compiled and loaded.

        The result is meaningless, and does not affect the next `forward`.
        """
        steps = enumerate(self._steps[plan.digest])
        self._run(inputs, plan, ((place, step) for place, step in steps if step.layer in self._typical_layers))

    def _run(self, inputs: BatchInputs, plan: PipelinePlan, steps: Iterable[tuple[int, Step]]) -> None:
        """Run the prologue and these steps of the plan, each given with its index in the plan's steps."""
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
        """Return the SMs of its lanes. Nothing may run on them, and no CUDA graph that uses them may exist."""
        self._partitions.close()

    def hidden(self, inputs: BatchInputs) -> Tensor:
        """Hidden states [S, H] of the rows `inputs.logit_tokens`, behind the last norm; see `Workspace.hidden`."""
        return self.workspace.hidden(inputs)

    def logits(self, inputs: BatchInputs) -> Tensor:
        """Logits [S, V] of the rows `inputs.logit_tokens` of the batch just run; overwritten by the next call."""
        return self.workspace.logits(inputs)


def _typical_layers(model: DeviceModel) -> frozenset[int]:
    """Layers 0 and 1, which a plan may overlap, and the first layer of each further kind."""
    first_of = {kind.name: layer for layer, kind in reversed(list(enumerate(model.graph.layers)))}
    return frozenset({0, 1, *first_of.values()})
