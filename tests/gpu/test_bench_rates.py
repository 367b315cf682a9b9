"""The bounds measured on the device: plausible, and nothing of them stays in its memory."""

from __future__ import annotations

import pytest
import torch

from nanoflow.config import EngineConfig
from nanoflow.workload import Lengths

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.bench.rates import measure_bounds

pytestmark = pytest.mark.gpu


def test_bounds_of_a_small_model() -> None:
    lengths = [Lengths(num_prompt_tokens=512, num_output_tokens=128)] * 1000
    before_bytes = torch.cuda.memory_reserved()
    bounds = measure_bounds(EngineConfig(model="preset:qwen2.5-0.5b", dtype="bfloat16"), lengths)
    assert 0 < bounds.serial_tokens_per_s < bounds.optimal_tokens_per_s
    assert bounds.gemm_tflops > 1 and bounds.decode_kv_bytes_per_s is not None and bounds.decode_kv_bytes_per_s > 1e10
    # What libraries keep for themselves is small beside the gigabytes that were measured on.
    assert torch.cuda.memory_reserved() - before_bytes < 256 << 20
