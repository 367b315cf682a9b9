"""Vectors of prompts: means of hidden states, of one token of a prompt or of all.

A prompt may be computed in several parts, in batches that follow each other; the sums in between stay on the device.
The hidden states are those behind the model's last norm, which `PipelinedExecutor.hidden` gives. Which tokens count is
in the batch (`PromptPooling`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from nanoflow.batch import DenseBatch, Int32, Int64
from nanoflow.device.transfer import to_device
from nanoflow.executor.layout import Layout

Hidden = Callable[[Int32], Tensor]
"""Hidden states [N, H], in the model's type, of the tokens at these places of the batch just run (int32 [N])."""


class Pooler:
    """The sums of prompts that are computed in parts.

    Args:
        max_rows: Most hidden states that may be asked for at once.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        # By row of the state table: sum of its hidden states so far, float32 [H].
        self._sums: dict[int, Tensor] = {}

    def take(self, batch: DenseBatch, layout: Layout, hidden: Hidden) -> list[Tensor]:
        """Add what a batch has computed, for all its prompts at once.

        Returns:
            float32 [H] for each of `batch.poolings` that is the last of its prompt, on the device.
        """
        if not batch.poolings:
            return []
        vectors = []
        for pooling, part in zip(batch.poolings, self._parts(batch, layout, hidden), strict=True):
            row = int(batch.rows[pooling.request_index])
            before = self._sums.pop(row, None)
            # A sum that an earlier tenant of the row has left does not count.
            total = part if before is None or pooling.is_first else before + part
            if pooling.is_last:
                vectors.append(total / pooling.num_pooled)
            else:
                self._sums[row] = total
        return vectors

    def _parts(self, batch: DenseBatch, layout: Layout, hidden: Hidden) -> Tensor:
        """The sum of the hidden states of each part, float32 [parts, H]."""
        places = np.concatenate([layout.places[part.start : part.stop] for part in batch.poolings])
        owners: Int64 = np.repeat(np.arange(len(batch.poolings)), [part.stop - part.start for part in batch.poolings])
        sums: Tensor | None = None
        for first in range(0, len(places), self._max_rows):
            some = slice(first, first + self._max_rows)
            states = hidden(places[some]).float()
            sums = states.new_zeros(len(batch.poolings), states.shape[1]) if sums is None else sums
            sums.index_add_(0, to_device(owners[some], states.device), states)
        assert sums is not None, "each part has a token"
        return sums
