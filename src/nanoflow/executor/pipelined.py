"""The pipelined executor: runs any valid plan, nano-operation by nano-operation, in the order in which it issues them.

On a CPU the lanes execute in plan order, which `PipelinePlan.validate` has proven to respect every dependency. Tensors
are allocated once, for the largest batch.
"""

from __future__ import annotations

from torch import Tensor

from nanoflow.executor.buffers import DeviceModel, Workspace
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation
from nanoflow.kernels.launch import BatchInputs
from nanoflow.plan.plan import PipelinePlan, PlanError

_Step = tuple[int, Operation, TokenRange]


class PipelinedExecutor:
    """Runs batches of one model under the plans it was given.

    Raises:
        PlanError: A plan does not fit the model.
    """

    def __init__(
        self, model: DeviceModel, plans: tuple[PipelinePlan, ...], *, max_batch_tokens: int, max_logits: int
    ) -> None:
        self._model = model
        self.workspace = Workspace.allocate(model, num_tokens=max_batch_tokens, num_logits=max_logits)
        self._steps = {plan.digest: self._bind(plan) for plan in plans}

    def _bind(self, plan: PipelinePlan) -> tuple[_Step, ...]:
        plan.validate(self._model.graph)
        ops = {op.name: op for op in self._model.graph.layer}
        return tuple(
            (layer, ops[nano.operation], nano.tokens) for layer, nano in plan.issue_order(self._model.graph.num_layers)
        )

    def forward(self, inputs: BatchInputs, plan: PipelinePlan) -> None:
        """Run prologue and layers; `logits` reads what they leave.

        Raises:
            PlanError: The batch is larger than the plan.
        """
        if inputs.num_tokens > plan.num_tokens:
            raise PlanError(f"plan {plan.name!r} is for {plan.num_tokens} tokens, the batch has {inputs.num_tokens}")
        self.workspace.run_whole(self._model.graph.prologue, inputs)
        for layer, op, planned in self._steps[plan.digest]:
            there = inputs.tokens_in(op.scope)
            tokens = planned.clip(there.start, there.stop)
            if tokens.num_tokens:
                self.workspace.run(op, layer, tokens, inputs)

    def logits(self, inputs: BatchInputs) -> Tensor:
        """Logits [S, V] of the rows `inputs.logit_tokens` of the batch just run; overwritten by the next call."""
        return self.workspace.logits(inputs)
