"""What the costs of a batch depend on, counted token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nanoflow.graph.operation import BatchShape
from tests.graphs import batch_of


def test_the_shape_of_a_batch() -> None:
    """Two decodes behind 3 and 5 tokens, a whole prompt of 4, and 3 tokens of one behind 6; all but the last sample."""
    batch = replace(
        batch_of([(3, 1), (5, 1), (0, 4), (6, 3)], 2, 50, seed=0), sampled=np.array([0, 1, 2], dtype=np.int32)
    )
    assert batch.shape == BatchShape(
        num_tokens=9,
        num_decode_tokens=2,
        decode_context=4 + 6,
        prefill_context=(1 + 2 + 3 + 4) + (7 + 8 + 9),
        prefill_kv_tokens=4 + 9,
        num_sampled=3,
    )
