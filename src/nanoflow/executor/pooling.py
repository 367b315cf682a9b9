"""Vectors of prompts: the hidden state of the last token, or the mean of those of all tokens.

A prompt may be computed in several parts, in batches that follow each other; the sums in between stay on the device.
The hidden states are those behind the model's last norm, which `PipelinedExecutor.hidden` gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanoflow.batch import DenseBatch, Int32
from nanoflow.executor.layout import Layout
from nanoflow.request import Pooling

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
        """Add what a batch has computed.

        Returns:
            float32 [H] for each of `batch.poolings` that is the last of its prompt, on the device.
        """
        vectors = []
        for pooling in batch.poolings:
            row, places = int(batch.rows[pooling.request_index]), layout.places[pooling.start : pooling.stop]
            # The last token alone stands for the mean of itself.
            counted = places if pooling.kind is Pooling.MEAN else places[len(places) - pooling.is_last :]
            before = None if pooling.is_first else self._sums.pop(row, None)
            parts = [] if before is None else [before]
            for first in range(0, len(counted), self._max_rows):
                parts.append(hidden(counted[first : first + self._max_rows]).float().sum(0))
            if pooling.is_last:
                vectors.append(torch.stack(parts).sum(0) / pooling.num_pooled)
            elif parts:
                self._sums[row] = torch.stack(parts).sum(0)
        return vectors
