"""Asynchronous copies between host and device; only reading a value waits for it.

On a CPU nothing is copied. On a GPU copies go through pinned memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pinned memory that a tensor of any size goes through. A processor copies such a piece in about a millisecond.
_PIECE_BYTES = 8 * 2**20


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy an array to the device; same dtype and shape. On a GPU the copy is queued on the current stream."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Uploader:
    """Copies to the device on a stream of its own, in parallel with computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        """Copy an array to the device; work queued on the current stream afterwards sees it."""
        if self._stream is None:
            return to_device(array, self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            tensor = to_device(array, self._device)
        current.wait_stream(self._stream)
        # Keeps the memory from being reused by a later upload before this stream is done with it.
        tensor.record_stream(current)
        return tensor


class StagedCopier:
    """Copies tensors of any size from pageable memory, such as a mapped file, to a GPU. For one thread.

    A piece is copied to pinned memory, and converted on the way, while the one before is on its way to the device.
    Several threads with a copier each are several times as fast as one: reading a mapped file takes more of a
    processor's time than the copy takes of the bus.

    Args:
        device: A GPU; that of the thread from now on. Without an index it is the one that is current already.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pieces = [
            (torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            for _ in range(2)
        ]
        self._pieces = itertools.cycle(pieces)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue copies of all elements, converted to the target's type; `source` may be freed afterwards.

        Args:
            target: Contiguous, on the device; nothing that is queued there uses it yet.
            source: Of as many elements, on the host.
        """
        to, of = target.view(-1), source.reshape(-1)
        step = _PIECE_BYTES // target.element_size()
        for start in range(0, len(to), step):
            buffer, is_free = next(self._pieces)
            is_free.synchronize()
            part = of[start : start + step]
            piece = buffer.view(target.dtype)[: len(part)]
            piece.copy_(part)
            with torch.cuda.stream(self._stream):
                to[start : start + step].copy_(piece, non_blocking=True)
                is_free.record()

    def wait(self) -> None:
        """Wait until all is on the device."""
        self._stream.synchronize()


class Readback:
    """A copy of tensors to the host.

    Args:
        tensors: On one device; copied with their values after the work queued so far.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            # Blocking: the waiting thread sleeps, which leaves its core to the thread that forms batches.
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[NDArray[Any]]:
        """Wait for the values and return them. This is the host sync of an iteration: its caller needs the tokens."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]
