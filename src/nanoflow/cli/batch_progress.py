"""What `nanoflow batch` shows while it runs, and its summary: tokens/s, lines, and the time left, on standard error."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

from nanoflow.batch_files.requests import Counts

_LINE_EVERY_S = 30.0


class Progress:
    """A bar on a terminal; elsewhere a line now and then.

    Args:
        num_lines: Lines of the input.
        num_before: Lines that were answered before this run.
        is_shown: Show anything at all.
        stream: Where to.
    """

    def __init__(self, num_lines: int, num_before: int, *, is_shown: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._num_lines, self._num_before = num_lines, num_before
        self._begin_s = self._said_s = time.monotonic()
        self._says_lines = is_shown and not self._stream.isatty()
        self._bar = tqdm(
            total=num_lines,
            initial=num_before,
            unit="line",
            dynamic_ncols=True,
            file=self._stream,
            disable=not is_shown or self._says_lines,
        )

    @property
    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin_s

    def tell(self, counts: Counts) -> None:
        """Show how far a run is."""
        if not self._bar.disable:
            self._bar.set_postfix_str(self._rate(counts), refresh=False)
            self._bar.update(self._num_before + counts.num_answered - self._bar.n)
        elif self._says_lines and time.monotonic() - self._said_s >= _LINE_EVERY_S:
            self._said_s = time.monotonic()
            print(f"nanoflow batch: {self.line(counts)}", file=self._stream, flush=True)

    def line(self, counts: Counts) -> str:
        """How far a run is, in one line."""
        done, wall_s = self._num_before + counts.num_answered, self.wall_s
        left_s = (self._num_lines - done) * wall_s / max(counts.num_answered, 1)
        left = tqdm.format_interval(left_s)
        return f"{done:,} of {self._num_lines:,} lines, {self._rate(counts)}, {left} left"

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _rate(self, counts: Counts) -> str:
        tokens = counts.num_prompt_tokens + counts.num_completion_tokens
        return f"{tokens / max(self.wall_s, 1e-9):,.0f} tokens/s"
