"""Index tensors of a batch, as far as nobody else looks at them closely."""

from __future__ import annotations

import numpy as np
import torch

from nanoflow.executor.inputs import BatchSize, InputBuilder
from nanoflow.executor.layout import lay_out
from nanoflow.graph.graph import RopeSpec
from tests.graphs import batch_of

CPU = torch.device("cpu")
ROPE = RopeSpec(inv_freq=(1.0, 0.1), attention_factor=1.5)


def test_the_attention_factor_is_on_cosines_and_sines() -> None:
    inputs = InputBuilder((ROPE,), num_rows=4, device=CPU).build(batch_of([(3, 1), (0, 5)], 1, 50, seed=0))
    (rotation,) = inputs.rotations
    torch.testing.assert_close(rotation.cos**2 + rotation.sin**2, torch.full((6, 2), 1.5**2))
    assert rotation.sin[0, 0] == 1.5 * np.sin(np.float32(3.0)), "the decode stands at position 3"


def test_parts_of_prompts_that_are_not_there_begin_where_the_batch_ends() -> None:
    batch = batch_of([(3, 1), (0, 5), (0, 2)], 1, 50, seed=0)
    builder = InputBuilder((ROPE,), num_rows=4, device=CPU)
    loaded = builder.load(batch, lay_out(batch), BatchSize(num_tokens=16, num_decodes=4, num_prefills=4))
    assert builder.derive(loaded).prefills.query_start.tolist() == [1, 6, 8, 8, 8]


def test_page_tables_at_least_double_when_they_grow() -> None:
    """Each time all of them are copied, so a context that grows page by page may not copy them page by page."""
    builder = InputBuilder((ROPE,), num_rows=4, device=CPU, pages_per_row=4)
    for width, expected in ((3, 4), (5, 8), (8, 8), (9, 16), (100, 100)):
        builder._widen(width)
        assert builder._page_tables.shape == (4, expected)
