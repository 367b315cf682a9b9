"""Where nano-operations run on a GPU: on all of it, on a plain stream, on a part of their own, or beside others.

Disjoint multiprocessors (SMs) come from the driver's green contexts, through cuda-python: what torch offers gives the
same SMs to every context. Work keeps its SMs through capture and replay of CUDA graphs if it is captured on the lane's
stream.

Kernels that are small enough run beside each other on every SM. An SM divides its memory into shared memory and L1
cache, its carve-out, as suits the kernel that finds it idle, and takes no other that needs more shared memory until it
is idle again. So both kernels must prefer the largest carve-out: `Carveout` sees to that.

What a lane is worth is measured in `profiler/pairs.py`.
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

# The driver hands SMs out in groups of so many, from Hopper on.
SM_GROUP = 8
# Of streams: the lower, the sooner the device places what is queued there; 0 is that of any other stream.
_PLACED_FIRST = -1


class LaneError(ValueError):
    """There is no such lane on this device; one line that says why and what would do."""


@dataclass(slots=True, kw_only=True)
class LaneStream:
    """A stream and the SMs behind it.

    Attributes:
        mechanism: How it got them.
        stream: Where to queue or capture work.
        num_sms: SMs that its kernels can use.
        share: Part of the device's SMs.
    """

    mechanism: Mechanism
    stream: torch.cuda.Stream
    num_sms: int
    share: float
    _release: Callable[[], None] | None = field(default=None, repr=False)

    def close(self) -> None:
        """Wait for what is queued and give the SMs back; the stream is gone then. Closing twice does nothing."""
        release, self._release = self._release, None
        if release is not None:
            self.stream.synchronize()
            release()


def whole(device: torch.device) -> LaneStream:
    """The current stream, on all SMs."""
    return _unpartitioned(Mechanism.WHOLE, torch.cuda.current_stream(device), device)


def plain_stream(device: torch.device) -> LaneStream:
    """A stream of its own on all SMs: which kernels run is up to the device."""
    return _unpartitioned(Mechanism.STREAM, torch.cuda.Stream(device), device)  # type: ignore[no-untyped-call]


def beside_pair(device: torch.device) -> tuple[LaneStream, LaneStream]:
    """Two lanes on all SMs for kernels that fit on an SM together, launched within `Carveout.open`.

    What waits on the second lane is placed first. Kernels for memory belong there: the others' many programs would
    keep them from starting, while they leave room for the others.

    Raises:
        LaneError: No NVIDIA GPU.
    """
    _check_gpu(device)
    first, second = (torch.cuda.Stream(device, priority=priority) for priority in (0, _PLACED_FIRST))  # type: ignore[no-untyped-call]
    return _unpartitioned(Mechanism.BESIDE, first, device), _unpartitioned(Mechanism.BESIDE, second, device)


class Carveout:
    """Makes kernels prefer the largest carve-out, so that SMs which run one can take another.

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

        It can be a decorator too. A kernel keeps the preference wherever it runs later, which costs it L1 cache. Where
        the driver refuses, the launch raises LaneError.
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
        """Of a kernel that is loaded; once is enough, and asking takes microseconds of the host's time."""
        if function not in self._opened:
            preferred = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            largest = int(self._driver.CUshared_carveout.CU_SHAREDMEM_CARVEOUT_MAX_SHARED)
            _ask(self._driver, self._driver.cuFuncSetAttribute, function, preferred, largest)
            self._opened.add(function)


def partition_sms(num_sms: int, first_share: float) -> tuple[int, int]:
    """SMs of two disjoint lanes.

    The second lane gets a multiple of 8 SMs, as near to its share as can be; the first gets all others.

    Raises:
        LaneError: Nothing would be left for one of them.
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
        LaneError: A share that cannot be had, no NVIDIA GPU, cuda-python missing, or the driver refuses.
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
    """The smallest and the largest share of a first lane."""
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
    """What a function of the driver returns beside its status: nothing, a value or a tuple."""
    status, *values = function(*args)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise LaneError(f"the driver refuses to divide this GPU: {function.__name__} says {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
