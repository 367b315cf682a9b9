"""The reference executor: the graph in its own order, whole operations, new tensors in every iteration.

It uses no plan. The pipelined executor must agree with it.
"""

from __future__ import annotations

from torch import Tensor

from nanoflow.executor.buffers import DeviceModel, Workspace
from nanoflow.kernels.launch import BatchInputs


class ReferenceExecutor:
    """Runs batches of one model."""

    def __init__(self, model: DeviceModel) -> None:
        self._model = model

    def forward(self, inputs: BatchInputs) -> Tensor:
        """Run one iteration; returns logits [S, V] of the rows `inputs.logit_tokens`."""
        graph = self._model.graph
        workspace = Workspace.allocate(self._model, num_tokens=inputs.num_tokens, num_logits=len(inputs.logit_tokens))
        workspace.run_whole(graph.prologue, inputs)
        for layer, kind in enumerate(graph.layers):
            workspace.run_whole(kind.operations, inputs, layer)
        return workspace.logits(inputs)
