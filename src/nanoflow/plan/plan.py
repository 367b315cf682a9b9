"""`PipelinePlan`: in which order, on which lane and with which share the nano-operations of one layer run.

A plan is data with a JSON round trip. It knows operations by name only; `validate` checks it against a graph. A valid
plan can be slow, never incorrect: what must wait for what follows from the graph (`graph/nanobatch.py`), and a plan
whose order contradicts that is refused here with the culprits named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from nanoflow.errors import brief_line
from nanoflow.graph.graph import LayerKind, OpGraph
from nanoflow.graph.nanobatch import Access, TokenRange, depends
from nanoflow.graph.operation import OpKind
from nanoflow.plan.mechanisms import Mechanism, Opening

PLAN_VERSION = 1
# What shares that are meant to sum to 1 may be off by.
_ROUNDING = 1e-6


class PlanError(ValueError):
    """A plan cannot be executed; the message names the nano-operation or lane at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Where nano-operations run in order.

    Attributes:
        name: Unique in the plan.
        mechanism: How it gets its share (`plan/mechanisms.py`).
        share: Resource share R, 0 < R <= 1. Of two lanes that are one stream, the part of the steps of its
            instruction stream, R < 1.
    """

    name: str
    mechanism: Mechanism = Mechanism.WHOLE
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoOperation:
    """One operation on one nano-batch.

    Attributes:
        operation: Name of an operation of the graph's layer.
        start, stop: Token range of the dense batch. A smaller batch clips it, possibly to nothing.
        lane: Name of the lane it runs on.
        stage: Layers it lags behind: while period p runs nano-operations of stage 0 on layer p, this one runs on layer
            p - stage. That is how one layer's end runs beside the next layer's beginning.
        waits: Places in the plan of nano-operations that must have ended first, beyond data dependencies: those that
            stand before it in this period, those after it in the period before.
        predicted_start_s, predicted_end_s: When search expects it within the period; None if nothing predicted it.
    """

    operation: str
    start: int
    stop: int
    lane: str
    stage: int = 0
    waits: tuple[int, ...] = ()
    predicted_start_s: float | None = None
    predicted_end_s: float | None = None

    @property
    def tokens(self) -> TokenRange:
        """Its token range."""
        return TokenRange(start=self.start, stop=self.stop)

    def __str__(self) -> str:
        stage = f" (stage {self.stage})" if self.stage else ""
        return f"{self.operation}[{self.start}:{self.stop}]{stage}"


# No slots: cached properties need a __dict__.
@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """Order, lane, share and waits of each nano-operation of a layer.

    Attributes:
        name: For people.
        num_tokens: Largest dense batch it can run.
        lanes: The lanes; the first one also runs what stands outside the layers.
        nano_operations: In the order in which they are issued.
        predicted_makespan_s: Predicted time of one layer; None if nothing predicted it.
    """

    name: str
    num_tokens: int
    lanes: tuple[Lane, ...]
    nano_operations: tuple[NanoOperation, ...]
    predicted_makespan_s: float | None = None
    version: int = PLAN_VERSION

    @property
    def max_stage(self) -> int:
        """Layers that are in flight at once, less one."""
        return max(nano.stage for nano in self.nano_operations)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Places at which it cuts the batch into nano-batches, increasing."""
        return tuple(sorted({nano.stop for nano in self.nano_operations} - {self.num_tokens}))

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this plan's content."""
        return hashlib.sha256(self.to_json()).hexdigest()[:12]

    @cached_property
    def carry_lanes(self) -> tuple[Lane, ...]:
        """Two lanes that are one stream, as products carry decode attention; none in most plans."""
        return tuple(lane for lane in self.lanes if lane.mechanism.traits.opening is Opening.ONE_STREAM)

    def issue_order(self, num_layers: int) -> Iterator[tuple[int, NanoOperation]]:
        """Every (layer, nano-operation) of a model of so many layers, in the order in which they are issued."""
        for period in range(num_layers + self.max_stage):
            for nano in self.nano_operations:
                layer = period - nano.stage
                if 0 <= layer < num_layers:
                    yield layer, nano

    def issued_in(self, layers: Sequence[LayerKind]) -> Iterator[tuple[int, NanoOperation]]:
        """`issue_order` of layers of these kinds: a layer skips the operations that its kind does not have."""
        names = [{op.name for op in kind.operations} for kind in layers]
        yield from ((layer, nano) for layer, nano in self.issue_order(len(layers)) if nano.operation in names[layer])

    def validate(self, graph: OpGraph) -> None:
        """Check that the plan computes exactly the graph's layer, in an order that its dependencies allow.

        Raises:
            PlanError: Names the nano-operation, lane or token at fault.
        """
        self._check_lanes()
        self._check_nano_operations(graph)
        self._check_tiling(graph)
        self._check_ranges(graph)
        self._check_shares()
        self._check_carry(graph)
        self._check_order(graph)

    def _check_lanes(self) -> None:
        if self.version != PLAN_VERSION:
            raise PlanError(
                f"plan {self.name!r} has version {self.version}, this nanoflow reads version {PLAN_VERSION}"
            )
        if not self.lanes:
            raise PlanError(f"plan {self.name!r} has no lane")
        names = [lane.name for lane in self.lanes]
        for lane in self.lanes:
            if names.count(lane.name) > 1:
                raise PlanError(f"lane {lane.name!r} is there twice")
            if not 0 < lane.share <= 1:
                raise PlanError(f"lane {lane.name!r} has share {lane.share}, must be in (0, 1]")

    def _check_nano_operations(self, graph: OpGraph) -> None:
        lanes = {lane.name for lane in self.lanes}
        operations = {op.name for op in graph.layer}
        for place, nano in enumerate(self.nano_operations):
            if nano.operation not in operations:
                raise PlanError(f"{nano}: {graph.name} has no operation {nano.operation!r} in its layer")
            if nano.lane not in lanes:
                raise PlanError(f"{nano}: there is no lane {nano.lane!r}")
            if not 0 <= nano.start < nano.stop <= self.num_tokens:
                raise PlanError(f"{nano}: its token range is not inside 0:{self.num_tokens} or is empty")
            if nano.stage < 0:
                raise PlanError(f"{nano}: its stage is negative")
            if any(wait == place or not 0 <= wait < len(self.nano_operations) for wait in nano.waits):
                raise PlanError(f"{nano}: it can wait only for other nano-operations of the plan, not for {nano.waits}")

    def _check_tiling(self, graph: OpGraph) -> None:
        """Every operation's token range is covered exactly once."""
        for op in graph.layer:
            ranges = sorted(nano.tokens for nano in self.nano_operations if nano.operation == op.name)
            covered = 0
            for tokens in ranges:
                if tokens.start != covered:
                    fault = "is left out" if tokens.start > covered else "is computed twice"
                    raise PlanError(f"operation {op.name!r}: token {min(tokens.start, covered)} {fault}")
                covered = tokens.stop
            if covered != self.num_tokens:
                raise PlanError(f"operation {op.name!r}: token {covered} is left out")

    def _check_ranges(self, graph: OpGraph) -> None:
        """Operations that share a tensor whose rows belong to a range as a whole are cut at the same places."""
        for spec in graph.tensors:
            ops = [op.name for op in graph.layer if spec.is_by_range and spec.name in (*op.reads, *op.writes)]
            cuts = {op: {nano.stop for nano in self.nano_operations if nano.operation == op} for op in ops}
            for op in ops[1:]:
                if cuts[op] != cuts[ops[0]]:
                    place = min(cuts[op] ^ cuts[ops[0]])
                    raise PlanError(
                        f"operations {ops[0]!r} and {op!r} must be cut at the same places, as both use {spec.name!r}; "
                        f"only one is cut at token {place}"
                    )

    def _check_shares(self) -> None:
        """Where times are predicted, shares that run together sum to at most 1."""
        share_of = {lane.name: lane.share for lane in self.lanes}
        timed = [
            (nano.predicted_start_s, nano.predicted_end_s, nano)
            for nano in self.nano_operations
            if nano.predicted_start_s is not None and nano.predicted_end_s is not None
        ]
        for start_s, _, nano in timed:
            lanes_running = {other.lane for begin_s, end_s, other in timed if begin_s <= start_s < end_s}
            total = sum(share_of[lane] for lane in lanes_running)
            if total > 1 + _ROUNDING:
                raise PlanError(f"{nano}: when it starts, lanes {sorted(lanes_running)} together hold {total:.2f} > 1")

    def _check_carry(self, graph: OpGraph) -> None:
        """Of two lanes that are one stream, one has all decode attention and nothing else, the other one all the rest.

        Their shares are parts of the steps of one instruction stream: each less than 1, and both at most 1.
        """
        if not self.carry_lanes:
            return
        kinds = {op.name: op.kind for op in graph.layer}
        of_attention = {nano.lane for nano in self.nano_operations if kinds[nano.operation] is OpKind.DECODE_ATTENTION}
        of_others = {nano.lane for nano in self.nano_operations} - of_attention
        if (
            len(of_attention) != 1
            or len(of_others) != 1
            or of_attention | of_others != {lane.name for lane in self.carry_lanes}
        ):
            raise PlanError(
                f"plan {self.name!r}: lanes inside each other are two, one for all decode attention and one for all "
                "else that is in the layer"
            )
        shares = [lane.share for lane in self.carry_lanes]
        if max(shares) >= 1 or sum(shares) > 1 + _ROUNDING:
            raise PlanError(
                f"plan {self.name!r}: lanes inside each other share the steps of one instruction stream, so each has "
                f"less than 1 of them and both at most 1, not {' and '.join(f'{share:g}' for share in shares)}"
            )
        for nano in self.nano_operations:
            if nano.lane in of_attention and kinds[nano.operation] is not OpKind.DECODE_ATTENTION:
                raise PlanError(f"{nano}: lane {nano.lane!r} is inside another, so it takes decode attention alone")

    def _check_order(self, graph: OpGraph) -> None:
        """No nano-operation is issued before one that it depends on, within a layer and across neighbouring layers."""
        for layers in graph.neighbours(self.max_stage + 2):
            self._check_order_in(layers, graph)

    def _check_order_in(self, layers: Sequence[LayerKind], graph: OpGraph) -> None:
        """Check the order in layers of these kinds, which follow each other."""
        place_in_graph = {op.name: place for place, op in enumerate(graph.layer)}
        ops = [{op.name: op for op in kind.operations} for kind in layers]
        issued = [(Access(op=ops[at][n.operation], tokens=n.tokens, layer=at), n) for at, n in self.issued_in(layers)]
        for late, (second, second_nano) in enumerate(issued):
            for first, first_nano in issued[:late]:
                is_backwards = (second.layer, place_in_graph[second.op.name]) < (
                    first.layer,
                    place_in_graph[first.op.name],
                )
                if is_backwards and depends(graph, first, second):
                    raise PlanError(
                        f"{first_nano} of layer {first.layer} is issued before {second_nano} of layer {second.layer}, "
                        "on which it depends"
                    )

    def to_json(self) -> bytes:
        """The plan as a JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @staticmethod
    def from_json(document: bytes) -> PipelinePlan:
        """The plan in a JSON document.

        Raises:
            PlanError: The document is not a plan; the message says where.
        """
        try:
            return msgspec.json.decode(document, type=PipelinePlan)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PlanError(f"not a pipeline plan: {brief_line(error)}") from None

    @staticmethod
    def load(path: Path) -> PipelinePlan:
        """The plan in a file; `PlanError` if it cannot be read or is none."""
        try:
            return PipelinePlan.from_json(path.read_bytes())
        except OSError as error:
            raise PlanError(f"cannot read plan {path}: {error.strerror}") from None
