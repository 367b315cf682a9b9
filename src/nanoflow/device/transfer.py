"""Copies between host and device that nobody waits for until the value is needed.

On a CPU both directions cost nothing. On a GPU they go through pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor on the device, of the same type; on a GPU the copy is queued on the current stream."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Uploader:
    """Copies to the device beside what it computes, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        """The array on the device; work queued on the current stream from now on finds it there."""
        if self._stream is None:
            return to_device(array, self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            tensor = to_device(array, self._device)
        current.wait_stream(self._stream)
        # Its memory may not be given to a later upload before this stream is done with it.
        tensor.record_stream(current)
        return tensor


class Readback:
    """Tensors on their way to the host.

    Args:
        tensors: On one device; what they hold when the work queued so far is done is what arrives.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            # Blocking: the waiting thread sleeps instead of taking a core from the one that forms batches.
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[NDArray[Any]]:
        """The values. This is the host sync of an iteration: its caller needs the tokens."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]
