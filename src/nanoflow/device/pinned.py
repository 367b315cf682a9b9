"""Memory of the host that a GPU copies from and to by itself: large, and pinned while the engine already runs.

Pinning much memory takes seconds, so it is done by a thread, piece by piece; what is pinned can be used. On a CPU, and
where the system does not allow pinning, all of the memory can be used at once.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# A GPU does not copy across the border of two pieces.
_PIECE_BYTES = 512 * 2**20


class PinnedMemory:
    """Arrays of slots, zero at first.

    Args:
        slots: Number and bytes of the slots of each array.
        device: What copies from and to them.

    Attributes:
        arrays: uint8 [slots, bytes of a slot].
        piece_slots: For each array how many slots a piece has: a copy may not cross a border between pieces, which are
            at the multiples of this.

    Raises:
        MemoryError: The system does not give so much.
    """

    def __init__(self, slots: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._maps: list[mmap.mmap] = []
        try:
            self._maps += [mmap.mmap(-1, count * size) for count, size in slots]
        except OSError as error:
            raise MemoryError(str(error)) from None
        self.arrays: tuple[NDArray[np.uint8], ...] = tuple(
            np.frombuffer(each, dtype=np.uint8).reshape(count, size)
            for each, (count, size) in zip(self._maps, slots, strict=True)
        )
        # Pieces begin at borders of slots and of the system's pages.
        steps = [math.lcm(size, mmap.PAGESIZE) // size for _, size in slots]
        self.piece_slots = tuple(
            max(_PIECE_BYTES // (step * size), 1) * step for step, (_, size) in zip(steps, slots, strict=True)
        )
        self._num_ready = [0] * len(slots)
        self._pinned: list[int] = []
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            for each in self._maps:
                with suppress(OSError, ValueError):
                    each.madvise(mmap.MADV_HUGEPAGE)
            index = torch.cuda.current_device() if device.index is None else device.index
            self._thread = threading.Thread(target=self._pin, args=(index,), name="nanoflow-pin", daemon=True)
            self._thread.start()
        else:
            self._num_ready = [count for count, _ in slots]

    @property
    def num_ready(self) -> tuple[int, ...]:
        """For each array how many slots, from the first, can be used."""
        return tuple(self._num_ready)

    def close(self) -> None:
        """Unpin. Nothing may be copied any more."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._pinned = []

    def _pin(self, device_index: int) -> None:
        torch.cuda.set_device(device_index)
        is_refused = False
        for index, array in enumerate(self.arrays):
            for start in range(0, len(array), self.piece_slots[index]):
                if self._is_closed.is_set():
                    return
                piece = array[start : start + self.piece_slots[index]]
                if not is_refused:
                    address = piece.ctypes.data
                    result = torch.cuda.cudart().cudaHostRegister(address, piece.nbytes, 0)  # type: ignore[no-untyped-call]
                    is_refused = int(result) != 0
                    if is_refused:
                        logger.warning(
                            "the system does not pin memory for KV pages (%s), so copies are slower: see `ulimit -l`",
                            result,
                        )
                    else:
                        self._pinned.append(address)
                self._num_ready[index] = start + len(piece)
