"""How the forward pass of a batch runs: the interface, and its eager form, which launches kernel by kernel.

`pipelined.py` has the walk through a plan that both forms run. `captured.py` has the form that replays CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nanoflow.batch import DenseBatch
from nanoflow.executor.inputs import BatchSize, InputBuilder
from nanoflow.executor.layout import Layout
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.kernels.launch import BatchInputs
from nanoflow.plan.plan import PipelinePlan

GraphKey = tuple[PipelinePlan, BatchSize]
"""What a CUDA graph is recorded for."""


class Forward(Protocol):
    """Runs the forward pass of a batch: the operations before the layers, then the layers."""

    @property
    def num_prepared(self) -> int:
        """Batches so far that took longer because there was no graph for their plan and size."""

    def __call__(self, batch: DenseBatch, layout: Layout, plan: PipelinePlan) -> BatchInputs:
        """Queue the work on the device; returns what `PipelinedExecutor.logits` needs.

        Args:
            batch: All tokens of the iteration.
            layout: The place of each of these tokens in the tensors of the iteration.
            plan: One of the executor's plans.

        Raises:
            PlanError: The batch has more tokens than the plan.
        """

    def compile(self, wanted: Sequence[GraphKey]) -> None:
        """Launch every kernel that these need once, so that it is compiled; the results are not used."""

    def prepare(self, wanted: Sequence[GraphKey], within_s: float) -> None:
        """Record graphs in the given order for some seconds; the rest is left to `prepare_next`."""

    def prepare_next(self) -> bool:
        """Record one of the graphs that were left; False if there was none."""

    def close(self) -> None:
        """Release its resources once all queued work has run; it cannot be used afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerForward:
    """Launches kernel by kernel, on any device; there is nothing to prepare."""

    executor: PipelinedExecutor
    builder: InputBuilder
    num_prepared: int = 0

    def __call__(self, batch: DenseBatch, layout: Layout, plan: PipelinePlan) -> BatchInputs:
        """See `Forward`."""
        inputs = self.builder.build(batch, layout)
        self.executor.forward(inputs, plan)
        return inputs

    def compile(self, wanted: Sequence[GraphKey]) -> None:
        """See `Forward`."""

    def prepare(self, wanted: Sequence[GraphKey], within_s: float) -> None:
        """See `Forward`."""

    def prepare_next(self) -> bool:
        """See `Forward`."""
        return False

    def close(self) -> None:
        """See `Forward`."""
        self.executor.close()
