"""Forward passes as CUDA graphs: one launch for an iteration instead of one for each kernel.

A graph belongs to a plan and a padded size of batch (`buckets.py`), and runs every batch that is padded to that size.
Kernels read lengths and page tables from device memory at fixed addresses, so each batch is copied there before its
graph is replayed. Recording a graph takes the host about as long as launching its kernels one by one. So when a batch
has no graph yet, one is recorded and replayed at once. `prepare` records the common ones before the first request, and
`prepare_next` records one more whenever the engine is idle.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nanoflow.batch import DenseBatch
from nanoflow.device.transfer import to_device
from nanoflow.executor.buckets import Buckets
from nanoflow.executor.forward import GraphKey
from nanoflow.executor.inputs import BatchSize, InputBuilder, LoadedBatch, RequestTables, padding
from nanoflow.executor.layout import Layout
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.kernels.launch import BatchInputs
from nanoflow.plan.plan import PipelinePlan, PlanError

# A graph of a model of 32 layers takes some megabytes; the least recently used one makes room.
_MAX_GRAPHS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """A CUDA graph, and the index tensors that it computes in its own memory."""

    graph: torch.cuda.CUDAGraph
    inputs: BatchInputs


class CapturedForward:
    """Replays CUDA graphs; see `Forward`.

    Args:
        executor, builder: Run the work that is recorded.
        buckets: Sizes to pad to.
        plans: All plans that batches may come with; their cuts decide how large page tables are.
        pages_per_request: Width of the page tables: pages of the longest sequence.
        device: A GPU.
    """

    def __init__(
        self,
        executor: PipelinedExecutor,
        builder: InputBuilder,
        buckets: Buckets,
        plans: Sequence[PipelinePlan],
        *,
        pages_per_request: int,
        device: torch.device,
    ) -> None:
        self._executor, self._builder, self._buckets = executor, builder, buckets
        self.num_prepared = 0
        self._tables = RequestTables(
            **{
                name: torch.zeros(
                    (builder.num_groups, max(map(room, plans)), pages_per_request), dtype=torch.int32, device=device
                )
                for name, room in (("decodes", buckets.max_decodes), ("prefills", buckets.max_prefills))
            }
        )
        self._device = device
        self._places: dict[BatchSize, LoadedBatch] = {}
        self._captured: OrderedDict[tuple[str, BatchSize], _Captured] = OrderedDict()
        self._wanted: deque[GraphKey] = deque()
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: DenseBatch, layout: Layout, plan: PipelinePlan) -> BatchInputs:
        """See `Forward`."""
        exact = BatchSize.of(layout)
        if exact.num_tokens > plan.num_tokens:
            raise PlanError(f"plan {plan.name!r} is for {plan.num_tokens} tokens, the batch has {exact.num_tokens}")
        size = self._buckets.size_for(exact, plan)
        loaded = self._builder.load(batch, layout, size, self._tables)
        self._place(size).numbers.copy_(loaded.numbers)
        self.num_prepared += (plan.digest, size) not in self._captured
        captured = self._graph(plan, size)
        captured.graph.replay()
        return replace(captured.inputs, logit_tokens=loaded.logit_tokens)

    def compile(self, wanted: Sequence[GraphKey]) -> None:
        """See `Forward`."""
        for plan, size in wanted:
            self._executor.forward_typical(self._builder.derive(self._place(size)), plan)

    def prepare(self, wanted: Sequence[GraphKey], within_s: float) -> None:
        """See `Forward`."""
        until_s = time.monotonic() + within_s
        self._wanted.extend(wanted)
        while time.monotonic() < until_s and self.prepare_next():
            pass

    def prepare_next(self) -> bool:
        """See `Forward`."""
        while self._wanted and len(self._captured) < _MAX_GRAPHS:
            plan, size = self._wanted.popleft()
            if (plan.digest, size) not in self._captured:
                self._graph(plan, size)
                return True
        return False

    def close(self) -> None:
        """See `Forward`; graphs go before the SMs that they were recorded on."""
        torch.cuda.synchronize(self._device)
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._executor.close()

    def _place(self, size: BatchSize) -> LoadedBatch:
        """The tensors that the graphs of a size read; at first they hold a batch of padding alone."""
        place = self._places.get(size)
        if place is None:
            place = self._places[size] = LoadedBatch(
                size=size,
                numbers=to_device(padding(size, self._builder.num_groups), self._device),
                tables=RequestTables(
                    decodes=self._tables.decodes[:, : size.num_decodes],
                    prefills=self._tables.prefills[:, : size.num_prefills],
                ),
                logit_tokens=torch.empty(0, dtype=torch.int32, device=self._device),
                first_prefill_token=0,
                host=None,
            )
        return place

    def _graph(self, plan: PipelinePlan, size: BatchSize) -> _Captured:
        """The graph of a plan for a size; recorded now if there is none."""
        key = (plan.digest, size)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(self._place(size), plan)
        self._captured.move_to_end(key)
        return captured

    def _capture(self, place: LoadedBatch, plan: PipelinePlan) -> _Captured:
        """Record the work of a size. The device runs queued work meanwhile, which hides the recording."""
        if len(self._captured) >= _MAX_GRAPHS:
            # The removed graph may still be running.
            torch.cuda.current_stream().synchronize()
            self._captured.popitem(last=False)
        # Kernels and libraries are loaded when they first run, which is not possible while a graph is recorded.
        self._executor.forward_typical(self._builder.derive(place), plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._capture_stream):
            # In this mode other threads may wait for their copies meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                inputs = self._builder.derive(place)
                self._executor.forward(inputs, plan)
            finally:
                graph.capture_end()
        return _Captured(graph=graph, inputs=inputs)
