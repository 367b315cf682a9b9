"""Expected output lengths of interactive and of background requests, learnt apart: batch work has lengths of its own.

Preemptions count apart too. A background request that was sent back for interactive ones makes the scheduler expect
more of the other background ones, so that fewer are let in where interactive ones will need the pages.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nanoflow.batch import Bool, Int64
from nanoflow.scheduler.lengths import OutputLength
from nanoflow.scheduler.progress import Progress


class ClassLengths:
    """One `OutputLength` for each class; methods are as there, with the class of each request.

    Attributes:
        interactive, background: Of each class.
    """

    def __init__(self) -> None:
        self.interactive, self.background = OutputLength(), OutputLength()

    def observe_tokens(self, num_generated: Int64, is_last: Bool, is_background: Bool) -> None:
        """Count one token of each request."""
        if not is_background.any():
            self.interactive.observe_tokens(num_generated, is_last)
            return
        for lengths, is_own in ((self.interactive, ~is_background), (self.background, is_background)):
            if is_own.any():
                lengths.observe_tokens(num_generated[is_own], is_last[is_own])

    def observe_end(self, num_generated: int, *, is_background: bool) -> None:
        """Count the end of a request."""
        self._of(is_background).observe_end(num_generated)

    def observe_preemption(self, *, is_background: bool) -> None:
        """Note that a request was sent back, as pages or rows have run out."""
        self._of(is_background).observe_preemption()

    def counted_remaining(self, progress: Progress) -> Int64:
        """Tokens that each request is assumed to generate from now on."""
        return self._by_class(OutputLength.counted_remaining, progress)

    def held_remaining(self, progress: Progress) -> Int64:
        """The same, but so that a request's prompt leaves with it too."""
        return self._by_class(OutputLength.held_remaining, progress)

    def _of(self, is_background: bool) -> OutputLength:
        return self.background if is_background else self.interactive

    def _by_class(self, expect: Callable[[OutputLength, Progress], Int64], progress: Progress) -> Int64:
        if not progress.is_background.any():
            return expect(self.interactive, progress)
        both = (expect(lengths, progress) for lengths in (self.background, self.interactive))
        return np.where(progress.is_background, *both)
