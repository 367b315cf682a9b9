"""Lanes of a plan at run time: on which stream and with which kernels each step runs, and the events between streams.

`OneLane` queues everything in issue order on the current stream. That is right on any device, because the order
respects every dependency. `GpuLanes` opens a stream for each lane, as the lane's mechanism says
(`plan/mechanisms.py`). `carry.py` has the lanes of products that carry attention, which are one stream. All of them can
be captured in a CUDA graph: lanes fork from the current stream and join it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from nanoflow.device.detect import count_sms
from nanoflow.executor.buffers import Workspace
from nanoflow.executor.carry import Carrier, CarryLanes
from nanoflow.executor.steps import Step
from nanoflow.executor.streams import (
    SM_GROUP,
    Carveout,
    LaneError,
    LaneStream,
    beside_pair,
    partition_pair,
    plain_stream,
)
from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.fp8 import products_in_blocks
from nanoflow.graph.operation import LinearDims, OpKind
from nanoflow.kernels.dispatch import Kernels
from nanoflow.kernels.hopper import can_carry, steps_of
from nanoflow.kernels.restricted import kernels_beside, kernels_on, kernels_on_stream
from nanoflow.plan.carry import carriers
from nanoflow.plan.mechanisms import KernelNeed, Opening
from nanoflow.plan.plan import Lane, PipelinePlan


class Lanes(Protocol):
    """Runs the steps of one plan on their lanes."""

    def running(self) -> AbstractContextManager[None]:
        """Context of a forward pass: its steps are queued within, and work that is queued after it waits for them."""

    def on(self, place: int) -> AbstractContextManager[Workspace]:
        """Context of the step at this index of the plan's steps.

        The stream waits for the steps that this one depends on, as far as this pass has queued them: a pass through
        some layers alone leaves steps out. Gives the tensors, with the kernels of the step's lane.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class OneLane:
    """All steps one after the other on the current stream."""

    workspace: Workspace

    def running(self) -> AbstractContextManager[None]:
        """See `Lanes`."""
        return nullcontext()

    def on(self, place: int) -> AbstractContextManager[Workspace]:
        """See `Lanes`."""
        return nullcontext(self.workspace)


def lane_kernels(need: KernelNeed, device: torch.device, kernels: Kernels, num_sms: int) -> Kernels:
    """The kernels of a device as a lane on so many SMs runs them.

    Each call makes new ones: products keep partial sums in a workspace, which two lanes may not share.

    Raises:
        LaneError: See `Carveout`.
    """
    made: dict[KernelNeed, Callable[[], Kernels]] = {
        KernelNeed.ANY: lambda: kernels,
        KernelNeed.FOR_SMS: lambda: kernels_on(kernels, num_sms),
        KernelNeed.SMALL: lambda: _with_carveout(device, kernels_beside(kernels, num_sms)),
    }
    return made[need]()


class Partitions:
    """Pairs of lanes on disjoint SMs or on the same ones, with their kernels; each pair is opened once.

    Plans share them, as only one plan runs at a time.
    """

    def __init__(self, device: torch.device, kernels: Kernels) -> None:
        self._device, self._kernels = device, kernels
        self._pairs: dict[int, tuple[LaneStream, LaneStream]] = {}
        self._kernels_of: dict[tuple[int, bool], Kernels] = {}
        self._beside: tuple[tuple[LaneStream, Kernels], ...] = ()

    def side(self, share: float, *, is_first: bool) -> tuple[LaneStream, Kernels]:
        """The stream of a lane with SMs of its own, and its kernels.

        Each pair divides the device in two. The second side has the first SMs of the device, so the second sides of
        two pairs overlap, and a first side is disjoint from every second side that is not larger than its own.

        Args:
            share: Part of the device's SMs.
            is_first: Whether products run on the lane; other operations are on the second side.

        Raises:
            LaneError: The share leaves a lane without SMs, or the device cannot be partitioned.
        """
        total = count_sms(self._device)
        second_sms = round((1.0 - share if is_first else share) * total / SM_GROUP) * SM_GROUP
        if second_sms not in self._pairs:
            self._pairs[second_sms] = partition_pair(self._device, 1.0 - second_sms / total)
        part = self._pairs[second_sms][0 if is_first else 1]
        if (second_sms, is_first) not in self._kernels_of:
            self._kernels_of[second_sms, is_first] = self._cut(part)
        return part, self._kernels_of[second_sms, is_first]

    def close(self) -> None:
        """Return all SMs to the device."""
        for pair in self._pairs.values():
            for part in pair:
                part.close()

    def beside(self, *, is_first: bool) -> tuple[LaneStream, Kernels]:
        """One of two lanes on all SMs whose kernels leave room for each other; products are on the first.

        Raises:
            LaneError: The device has no such lanes.
        """
        if not self._beside:
            self._beside = tuple((part, self._cut(part)) for part in beside_pair(self._device))
        return self._beside[0 if is_first else 1]

    def _cut(self, part: LaneStream) -> Kernels:
        return lane_kernels(part.mechanism.traits.kernels, self._device, self._kernels, part.num_sms)


class GpuLanes:
    """The lanes of a plan on a GPU.

    Args:
        plan, steps: The plan, and its steps in issue order.
        workspace: Tensors, and kernels for the whole device.
        partitions: Opens the streams of lanes.
    """

    def __init__(
        self, plan: PipelinePlan, steps: tuple[Step, ...], workspace: Workspace, partitions: Partitions
    ) -> None:
        self._device = workspace.model.device
        self._steps, self._whole = steps, workspace
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._workspaces: dict[str, Workspace] = {}
        for lane in plan.lanes:
            self._open(lane, steps, partitions)
        self._events = {place: _event() for place, step in enumerate(steps) if step.is_waited_for}
        self._begin, self._ends = _event(), {name: _event() for name in self._streams}
        # Steps whose events were recorded in this pass; another event may be of a graph, which no stream can wait for.
        self._recorded = set[int]()

    def _open(self, lane: Lane, steps: tuple[Step, ...], partitions: Partitions) -> None:
        """Open the stream of a lane; a lane with the mechanism `whole` runs on the current stream."""
        is_first = any(isinstance(step.op.dims, LinearDims | ExpertDims) for step in steps if step.lane == lane.name)
        openers: dict[Opening, Callable[[], tuple[LaneStream, Kernels]]] = {
            Opening.OWN_STREAM: lambda: (plain_stream(self._device), kernels_on_stream(self._whole.model.kernels)),
            Opening.OWN_SMS: lambda: partitions.side(lane.share, is_first=is_first),
            Opening.SHARED_SMS: lambda: partitions.beside(is_first=is_first),
        }
        opening = lane.mechanism.traits.opening
        if opening in openers:
            part, kernels = openers[opening]()
            self._streams[lane.name] = part.stream
            self._workspaces[lane.name] = replace(self._whole, model=replace(self._whole.model, kernels=kernels))

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `Lanes`."""
        self._recorded.clear()
        self._begin.record(torch.cuda.current_stream(self._device))
        for stream in self._streams.values():
            stream.wait_event(self._begin)
        yield
        current = torch.cuda.current_stream(self._device)
        for name, stream in self._streams.items():
            self._ends[name].record(stream)
            current.wait_event(self._ends[name])

    @contextmanager
    def on(self, place: int) -> Iterator[Workspace]:
        """See `Lanes`."""
        step = self._steps[place]
        stream = self._streams.get(step.lane) or torch.cuda.current_stream(self._device)
        for before in self._recorded.intersection(step.waits):
            stream.wait_event(self._events[before])
        with torch.cuda.stream(stream):
            yield self._workspaces.get(step.lane, self._whole)
        if step.is_waited_for:
            self._events[place].record(stream)
            self._recorded.add(place)


def open_lanes(plan: PipelinePlan, steps: tuple[Step, ...], workspace: Workspace, partitions: Partitions) -> Lanes:
    """The lanes of a plan; streams are opened only on a GPU and for plans with several lanes."""
    if workspace.model.device.type != "cuda" or len(plan.lanes) == 1:
        return OneLane(workspace=workspace)
    if plan.carry_lanes:
        carried = dict(carriers(plan, workspace.model.graph, workspace.model.graph.layers))
        return CarryLanes(steps, carried, workspace, _carrier(workspace, plan, steps))
    return GpuLanes(plan, steps, workspace, partitions)


def _carrier(workspace: Workspace, plan: PipelinePlan, steps: tuple[Step, ...]) -> Carrier:
    """Runs products with attention inside; the lane's share decides how many k-steps go to one block of keys.

    Raises:
        LaneError: There are no such kernels for this device or model.
    """
    model = workspace.model
    if blocked := products_in_blocks(model.graph):
        raise LaneError(
            f"plan {plan.name!r}: decode attention runs inside products in FP8 if weights have a scale for each row; "
            f"those of {', '.join(blocked)} have one for each block: run this model without the plan, or with "
            "quantization none"
        )
    attentions = [kind.attention for kind in model.graph.kinds]
    can_attend = all(can_carry(model.device, model.dtype, attention) for attention in attentions)
    if OpKind.LINEAR_SWIGLU not in model.kernels or not can_attend:
        raise LaneError(
            f"plan {plan.name!r}: decode attention runs inside products on Hopper GPUs, in bfloat16 (keys and values "
            "too), with heads of 64 or 128 and no window: run this model without the plan"
        )
    products = next(step.lane for step in steps if isinstance(step.op.dims, LinearDims))
    share = next(lane.share for lane in plan.lanes if lane.name == products)
    from nanoflow.kernels.hopper.carry import HopperCarrier

    return HopperCarrier(num_sms=count_sms(model.device), steps=steps_of(share))


def _with_carveout(device: torch.device, kernels: Kernels) -> Kernels:
    """The same kernels, each launched with the largest carve-out."""
    carveout = Carveout(device)
    return {kind: carveout.open()(kernel) for kind, kernel in kernels.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
