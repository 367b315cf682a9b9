"""The soak of `tests/soak.py` on a GPU, with its kernels and CUDA graphs; NANOFLOW_SOAK_S says for how many seconds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nanoflow.config import DType
from tests.soak import NUM_RUN_ALONE, make_soak_model, soak

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
DURATION_S = float(os.environ.get("NANOFLOW_SOAK_S", "20")) / len(DTYPES)


@pytest.mark.timeout(300 + 2 * DURATION_S)
@pytest.mark.parametrize("dtype", DTYPES)
def test_soak(dtype: DType, tmp_path: Path) -> None:
    report = soak(make_soak_model(tmp_path), device="cuda", dtype=dtype, duration_s=DURATION_S)
    print(report)
    assert report.num_finished > NUM_RUN_ALONE and report.num_cancelled > 0 and report.num_preemptions > 0
    assert report.num_compared == (NUM_RUN_ALONE if dtype == "float32" else 0) and report.num_ties <= 2
