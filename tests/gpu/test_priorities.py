"""Background requests on a GPU, with CUDA graphs: left out of iterations, they go on with the right tokens."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from tests.left_out import tokens_alone_and_beside

pytestmark = pytest.mark.gpu


def test_requests_that_were_left_out_get_the_same_tokens_on_a_gpu() -> None:
    alone, beside, num_without = tokens_alone_and_beside("cuda")
    assert beside == alone
    assert num_without > 5
