"""Forward passes as CUDA graphs: one launch an iteration instead of one a kernel.

A graph serves every batch of its bucket. Kernels read lengths and page tables from device memory, at places that stay
the same; so a batch is laid out with padding up to its bucket, copied there, and the graph is replayed. A bucket runs
kernel by kernel when it is first met, which compiles what is missing, and is captured the second time. What the kernels
do stands in the plan: `pipelined.py`, which is also what runs where there are no graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from nanoflow.batch import DenseBatch
from nanoflow.executor.inputs import BatchSize, InputBuilder, LoadedBatch, RequestTables
from nanoflow.executor.layout import Layout
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.kernels.launch import BatchInputs
from nanoflow.plan.plan import PipelinePlan, PlanError

# A graph of a model of 32 layers takes some megabytes; the least recently used one makes room.
_MAX_GRAPHS = 256


class Forward(Protocol):
    """Runs prologue and layers of a batch."""

    @property
    def num_prepared(self) -> int:
        """Batches so far that took longer because their bucket was met for the first or second time."""

    def __call__(self, batch: DenseBatch, layout: Layout, plan: PipelinePlan) -> BatchInputs:
        """Queue the work; gives what `PipelinedExecutor.logits` needs."""

    def close(self) -> None:
        """Give back what it holds, once all that was queued has run; it is of no use afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerForward:
    """Kernel by kernel."""

    executor: PipelinedExecutor
    builder: InputBuilder
    num_prepared: int = 0

    def __call__(self, batch: DenseBatch, layout: Layout, plan: PipelinePlan) -> BatchInputs:
        """See `Forward`."""
        inputs = self.builder.build(batch, layout)
        self.executor.forward(inputs, plan)
        return inputs

    def close(self) -> None:
        """See `Forward`."""
        self.executor.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Sizes that batches are padded to, so that few graphs serve all.

    Attributes:
        max_tokens: The token budget.
        max_decodes: Places from the first on among which decodes may be.
        max_prefills: Most parts of prompts, and gaps between them.
    """

    max_tokens: int
    max_decodes: int
    max_prefills: int

    @staticmethod
    def of(max_tokens: int, max_requests: int, plans: Iterable[PipelinePlan] = ()) -> Buckets:
        """For batches of so many requests, dealt over the nano-batches of any of these plans."""
        num_cuts = max((len(plan.cuts) for plan in plans), default=0)
        # A cut may end a chunk, and a gap follows it.
        return Buckets(
            max_tokens=max_tokens,
            max_decodes=max_tokens if num_cuts else max_requests,
            max_prefills=max_requests + 2 * num_cuts,
        )

    def size_for(self, size: BatchSize, plan_tokens: int) -> BatchSize:
        """The smallest bucket with room for a batch of this size, under a plan for so many tokens.

        Tokens go up in steps small beside what a product costs: powers of two to 16, then eighths of the next power of
        two, 128 at most. Decodes and prefills cost next to nothing as padding: powers of two, and of four.
        """
        num_tokens = min(_round_tokens(size.num_tokens), plan_tokens, self.max_tokens)
        return BatchSize(
            num_tokens=num_tokens,
            num_decodes=min(_round_power(size.num_decodes, 2), self.max_decodes, num_tokens),
            num_prefills=min(_round_power(size.num_prefills, 4), self.max_prefills),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """A graph, and the index tensors in its own memory that it computes."""

    graph: torch.cuda.CUDAGraph
    inputs: BatchInputs


class CapturedForward:
    """Replays graphs.

    Args:
        executor, builder: Run what is not captured, and what is captured.
        buckets: Sizes to pad to.
        pages_per_request: Width of the page tables: pages of the longest sequence.
        device: Where.
    """

    def __init__(
        self,
        executor: PipelinedExecutor,
        builder: InputBuilder,
        buckets: Buckets,
        *,
        pages_per_request: int,
        device: torch.device,
    ) -> None:
        self._executor, self._builder, self._buckets = executor, builder, buckets
        self.num_prepared = 0
        self._tables = RequestTables(
            decodes=torch.zeros((buckets.max_decodes, pages_per_request), dtype=torch.int32, device=device),
            prefills=torch.zeros((buckets.max_prefills, pages_per_request), dtype=torch.int32, device=device),
        )
        self._places: dict[BatchSize, LoadedBatch] = {}
        self._met: set[tuple[str, BatchSize]] = set()
        self._captured: OrderedDict[tuple[str, BatchSize], _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: DenseBatch, layout: Layout, plan: PipelinePlan) -> BatchInputs:
        """See `Forward`."""
        exact = BatchSize.of(layout)
        if exact.num_tokens > plan.num_tokens:
            raise PlanError(f"plan {plan.name!r} is for {plan.num_tokens} tokens, the batch has {exact.num_tokens}")
        size = self._buckets.size_for(exact, plan.num_tokens)
        loaded = self._builder.load(batch, layout, size, self._tables)
        inputs = self._run(self._place(size, loaded), plan)
        return replace(inputs, logit_tokens=loaded.logit_tokens)

    def close(self) -> None:
        """See `Forward`; graphs go before the SMs that they were captured on."""
        torch.cuda.synchronize(self._tables.decodes.device)
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._executor.close()

    def _place(self, size: BatchSize, loaded: LoadedBatch) -> LoadedBatch:
        """Copy the numbers of a batch to where the graphs of its size read; its page tables are there already."""
        place = self._places.get(size)
        if place is None:
            place = self._places[size] = LoadedBatch(
                size=size,
                numbers=torch.empty_like(loaded.numbers),
                tables=RequestTables(
                    decodes=self._tables.decodes[: size.num_decodes],
                    prefills=self._tables.prefills[: size.num_prefills],
                ),
                logit_tokens=loaded.logit_tokens.new_empty(0),
                first_prefill_token=0,
                host=None,
            )
        place.numbers.copy_(loaded.numbers)
        return place

    def _run(self, place: LoadedBatch, plan: PipelinePlan) -> BatchInputs:
        key = (plan.digest, place.size)
        captured = self._captured.get(key)
        self.num_prepared += captured is None
        if captured is None and key not in self._met:
            self._met.add(key)
            inputs = self._builder.derive(place)
            self._executor.forward(inputs, plan)
            return inputs
        if captured is None:
            captured = self._captured[key] = self._capture(place, plan)
        self._captured.move_to_end(key)
        captured.graph.replay()
        return captured.inputs

    def _capture(self, place: LoadedBatch, plan: PipelinePlan) -> _Captured:
        """Record the work of a bucket. The device goes on with what is queued, so this hides behind the last batch."""
        if len(self._captured) == _MAX_GRAPHS:
            # It may still be running.
            torch.cuda.current_stream().synchronize()
            self._captured.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._capture_stream):
            # Other threads may wait for their copies meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                inputs = self._builder.derive(place)
                self._executor.forward(inputs, plan)
            finally:
                graph.capture_end()
        return _Captured(graph=graph, inputs=inputs)


def _round_tokens(count: int) -> int:
    """At least `count`: a power of two to 16, from there a multiple of an eighth of the next one, or of 128."""
    power = _round_power(count, 2)
    step = min(max(power // 8, 1), 128)
    return power if power <= 16 else -(-count // step) * step


def _round_power(count: int, base: int) -> int:
    """The smallest power of `base` that is at least `count`; 0 for 0."""
    power = 1
    while power < count:
        power *= base
    return power if count else 0
