"""The copies of the loop: hands what the tiers of the KV cache want copied to the worker, and tells when it is done.

What is copied is decided in `scheduler/lower_tiers.py`; without lower tiers there is never anything to do.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait

from nanoflow.executor.worker import Worker
from nanoflow.scheduler.tiers import Tiers

# How long the loop sleeps at most when it has nothing to do but to wait for copies, and how long for the disk.
_WAIT_S = 0.05
_DISK_S = 0.001
_CLOSE_S = 5.0

logger = logging.getLogger(__name__)


class Copying:
    """Copies on their way.

    Args:
        tiers: The scheduler's.
        worker: Copies.
    """

    def __init__(self, tiers: Tiers, worker: Worker) -> None:
        self._tiers, self._worker = tiers, worker
        self._pending: dict[int, Future[float]] = {}
        self._is_closed = False

    def collect(self) -> None:
        """Tell the tiers which copies are done; raises what made one fail."""
        for number in [number for number, future in self._pending.items() if future.done()]:
            self._tiers.note_copied(number, self._pending.pop(number).result())

    def issue(self) -> None:
        """Queue what is to be copied now, behind the batches that have been launched."""
        for copies in self._tiers.take_copies():
            self._pending[copies.number] = self._worker.copy(copies)

    def wait(self) -> None:
        """Wait a moment for pages that are being loaded; nothing else can be done."""
        if self._tiers.is_loading:
            if self._pending:
                wait(self._pending.values(), timeout=_WAIT_S, return_when=FIRST_COMPLETED)
            else:
                time.sleep(_DISK_S)

    def idle(self) -> bool:
        """There are no requests: keep more in lower tiers. True if there is more of that to do soon."""
        self.issue()
        wait(self._pending.values(), timeout=_WAIT_S)
        self.collect()
        return self._tiers.idle() or bool(self._pending)

    def close(self) -> None:
        """Let copies end, so that the tiers can keep what is to outlive the engine, and close them; once."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            # Pages of the last batch are saved after those before them.
            for _ in range(2):
                self.issue()
            wait(self._pending.values(), timeout=_CLOSE_S)
            self.collect()
        # What made a copy fail has been told, or is told by the batch that failed of the same.
        except Exception as error:
            logger.warning("KV pages on their way are not kept: %s", error)
        self._tiers.close()
