"""CUDA streams for lanes, and the SMs behind them: all SMs, disjoint parts of the GPU, or all SMs shared by two lanes.

`lanes.py` assigns these streams to the lanes of a plan; `profiler/pairs.py` measures how fast kernels run on them.

Disjoint multiprocessors (SMs) come from the driver's green contexts, through cuda-python: torch's own interface gives
the same SMs to every context. Work keeps its SMs through capture and replay of a CUDA graph if it is captured on the
lane's stream.

Kernels that are small enough run beside each other on every SM. An SM divides its memory into L1 cache and shared
memory; the part for shared memory is its carve-out. It sets the carve-out when it is idle, for the first kernel that
arrives, and until it is idle again it takes no kernel that needs more. So both kernels must prefer the largest
carve-out, which `Carveout` sets.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from nanoflow.device.detect import count_sms
from nanoflow.plan.mechanisms import Mechanism

# From Hopper on the driver partitions SMs in groups of this size.
SM_GROUP = 8
# Priority of a stream: the device places blocks of lower numbers first; other streams have 0.
_PLACED_FIRST = -1


class LaneError(ValueError):
    """There is no such lane on this device; the message is one line that says why, and what would work."""


@dataclass(slots=True, kw_only=True)
class LaneStream:
    """A stream and the SMs behind it.

    Attributes:
        mechanism: How it shares the device with other lanes.
        stream: Work is queued, or captured, on it.
        num_sms: SMs that its kernels can use.
        share: Part of the device's SMs.
    """

    mechanism: Mechanism
    stream: torch.cuda.Stream
    num_sms: int
    share: float
    _release: Callable[[], None] | None = field(default=None, repr=False)

    def close(self) -> None:
        """Wait for queued work, then destroy the stream and return its SMs. Closing twice does nothing."""
        release, self._release = self._release, None
        if release is not None:
            self.stream.synchronize()
            release()


def whole(device: torch.device) -> LaneStream:
    """The current stream, on all SMs."""
    return _unpartitioned(Mechanism.WHOLE, torch.cuda.current_stream(device), device)


def plain_stream(device: torch.device) -> LaneStream:
    """A new stream on all SMs; the device decides which of the queued kernels run."""
    return _unpartitioned(Mechanism.STREAM, torch.cuda.Stream(device), device)  # type: ignore[no-untyped-call]


def beside_pair(device: torch.device) -> tuple[LaneStream, LaneStream]:
    """Two lanes on all SMs for kernels that fit on an SM together, launched within `Carveout.open`.

    Programs queued on the second lane are placed on SMs first. Memory-bound kernels belong there: the many programs of
    the first lane would keep them from starting, while they leave room for those programs.

    Raises:
        LaneError: No NVIDIA GPU.
    """
    _check_gpu(device)
    first, second = (torch.cuda.Stream(device, priority=priority) for priority in (0, _PLACED_FIRST))  # type: ignore[no-untyped-call]
    return _unpartitioned(Mechanism.BESIDE, first, device), _unpartitioned(Mechanism.BESIDE, second, device)


class Carveout:
    """Makes kernels prefer the largest carve-out, so that an SM that runs one of them has room for another.

    Args:
        device: An NVIDIA GPU.

    Raises:
        LaneError: No NVIDIA GPU, or cuda-python or Triton is missing.
    """

    def __init__(self, device: torch.device) -> None:
        self._driver = _driver(device)
        if importlib.util.find_spec("triton") is None:
            raise LaneError("lanes beside each other need kernels in Triton: pip install triton")
        self._knobs = importlib.import_module("triton.knobs")
        self._opened: set[int] = set()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Triton kernels launched within, or captured in a CUDA graph, prefer the largest carve-out from then on.

        The result is also a decorator. A kernel keeps the preference wherever it runs later, which costs it L1 cache.
        If the driver refuses, the launch raises LaneError.
        """

        def open_function(launch: Any) -> None:
            self._open(launch.data["function"])

        hooks = self._knobs.runtime.launch_enter_hook
        hooks.add(open_function)
        try:
            yield
        finally:
            hooks.remove(open_function)

    def _open(self, function: int) -> None:
        """Set the preference of a loaded kernel, once: each call takes microseconds of host time."""
        if function not in self._opened:
            preferred = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            largest = int(self._driver.CUshared_carveout.CU_SHAREDMEM_CARVEOUT_MAX_SHARED)
            _ask(self._driver, self._driver.cuFuncSetAttribute, function, preferred, largest)
            self._opened.add(function)


def partition_sms(num_sms: int, first_share: float) -> tuple[int, int]:
    """SMs of two disjoint lanes.

    The second lane gets the multiple of 8 SMs that is nearest to its share; the first gets all others.

    Raises:
        LaneError: One of them would get none.
    """
    second = round(num_sms * (1.0 - first_share) / SM_GROUP) * SM_GROUP
    first = num_sms - second
    if second < SM_GROUP or first < SM_GROUP:
        lowest, highest = _limits(num_sms)
        advice = f"reduce it to {highest:.2f} or less" if second < SM_GROUP else f"raise it to {lowest:.2f} or more"
        raise LaneError(
            f"a share of {first_share:g} of {num_sms} SMs, in groups of {SM_GROUP}, leaves a lane with none: {advice}"
        )
    return first, second


def partition_pair(device: torch.device, first_share: float) -> tuple[LaneStream, LaneStream]:
    """Two lanes on disjoint SMs, rounded as `partition_sms` says; close both when done.

    Raises:
        LaneError: The share leaves a lane without SMs, there is no NVIDIA GPU, cuda-python is missing, or the driver
            refuses.
    """
    driver = _driver(device)
    first_sms, second_sms = partition_sms(count_sms(device), first_share)
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()
        handle = _ask(driver, driver.cuDeviceGet, device.index or 0)
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        everything = _ask(driver, driver.cuDeviceGetDevResource, handle, kind)
        groups, _, remaining = _ask(driver, driver.cuDevSmResourceSplitByCount, 1, everything, 0, second_sms)
        first = _green_lane(driver, handle, remaining, device)
        try:
            second = _green_lane(driver, handle, groups[0], device)
        except LaneError:
            first.close()
            raise
    if (first.num_sms, second.num_sms) != (first_sms, second_sms):
        got = f"{first.num_sms} + {second.num_sms}"
        first.close()
        second.close()
        raise LaneError(f"asked for {first_sms} + {second_sms} SMs, the driver gave {got}: reduce the first share")
    return first, second


def _unpartitioned(mechanism: Mechanism, stream: torch.cuda.Stream, device: torch.device) -> LaneStream:
    return LaneStream(mechanism=mechanism, stream=stream, num_sms=count_sms(device), share=1.0)


def _limits(num_sms: int) -> tuple[float, float]:
    """The smallest and the largest share that a first lane can have."""
    most = (num_sms - SM_GROUP) // SM_GROUP * SM_GROUP
    return (num_sms - most) / num_sms, (num_sms - SM_GROUP) / num_sms


def _check_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise LaneError(f"device {device.type!r} has no SMs to divide; parallel lanes need an NVIDIA GPU")


def _driver(device: torch.device) -> Any:
    _check_gpu(device)
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise LaneError("lanes that divide a GPU need cuda-python: pip install 'nanoflow-engine[gpu]'")
    return importlib.import_module("cuda.bindings.driver")


def _green_lane(driver: Any, device_handle: Any, resource: Any, device: torch.device) -> LaneStream:
    """A stream on the SMs of a resource."""
    description = _ask(driver, driver.cuDevResourceGenerateDesc, [resource], 1)
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = _ask(driver, driver.cuGreenCtxCreate, description, device_handle, int(flags))
    non_blocking = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    try:
        handle = _ask(driver, driver.cuGreenCtxStreamCreate, context, non_blocking, 0)
    except LaneError:
        driver.cuGreenCtxDestroy(context)
        raise
    num_sms = int(resource.sm.smCount)

    def release() -> None:
        _ask(driver, driver.cuStreamDestroy, handle)
        _ask(driver, driver.cuGreenCtxDestroy, context)

    return LaneStream(
        mechanism=Mechanism.PARTITION,
        stream=torch.cuda.ExternalStream(int(handle), device=device),  # type: ignore[no-untyped-call]
        num_sms=num_sms,
        share=num_sms / count_sms(device),
        _release=release,
    )


def _ask(driver: Any, function: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
    """Call a function of the driver: its results without the status, as one value or a tuple; LaneError if it fails."""
    status, *values = function(*args)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise LaneError(f"the driver refuses to divide this GPU: {function.__name__} says {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
