"""Memory of the host that a GPU copies from and to by itself: large, and pinned while the engine already runs.

Pinning takes about a second for 4 GiB, so it is done by a thread, piece by piece; what is pinned can be used. On a CPU,
and where the system does not allow pinning, all of the memory can be used at once.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_PIECE_BYTES = 512 * 2**20


class PinnedMemory:
    """Arrays of bytes, zero at first.

    Args:
        sizes: Bytes of each array.
        device: What copies from and to them.

    Attributes:
        arrays: uint8 [size], each beginning at a border of the system's pages.

    Raises:
        MemoryError: The system does not give so much.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._maps: list[mmap.mmap] = []
        try:
            self._maps += [mmap.mmap(-1, max(size, 1)) for size in sizes]
        except OSError as error:
            raise MemoryError(str(error)) from None
        self.arrays: tuple[NDArray[np.uint8], ...] = tuple(np.frombuffer(each, dtype=np.uint8) for each in self._maps)
        self._num_ready = [0] * len(sizes)
        self._pinned: list[int] = []
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            for each in self._maps:
                with suppress(OSError, ValueError):
                    each.madvise(mmap.MADV_HUGEPAGE)
            self._thread = threading.Thread(target=self._pin, args=(device,), name="nanoflow-pin", daemon=True)
            self._thread.start()
        else:
            self._num_ready = list(sizes)

    @property
    def num_ready(self) -> tuple[int, ...]:
        """For each array how many bytes, from the first, can be used."""
        return tuple(self._num_ready)

    def close(self) -> None:
        """Unpin. Nothing may be copied any more."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._pinned = []

    def _pin(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        is_refused = False
        for index, array in enumerate(self.arrays):
            for start in range(0, len(array), _PIECE_BYTES):
                if self._is_closed.is_set():
                    return
                stop = min(start + _PIECE_BYTES, len(array))
                if not is_refused:
                    address = array.ctypes.data + start
                    result = torch.cuda.cudart().cudaHostRegister(address, stop - start, 0)  # type: ignore[no-untyped-call]
                    is_refused = int(result) != 0
                    if is_refused:
                        logger.warning(
                            "the system does not pin memory for KV pages (%s), so copies are slower: see `ulimit -l`",
                            result,
                        )
                    else:
                        self._pinned.append(address)
                self._num_ready[index] = stop
