"""Compiling side by side, without running what is compiled."""

# mypy: allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

import triton
import triton.language as tl

from nanoflow.kernels.compiling import compiling

pytestmark = pytest.mark.gpu


@triton.jit
def _fill(out: tl.tensor, VALUE: tl.constexpr) -> None:
    tl.store(out + tl.program_id(0), VALUE)


def test_kernels_are_compiled_and_not_run() -> None:
    out = torch.zeros(8, device="cuda")
    cache = _fill.device_caches[torch.cuda.current_device()][0]
    with compiling() as compile_only:
        with compile_only():
            for value in (3, 4):
                _fill[(8,)](out, value)
        torch.cuda.synchronize()
        assert not out.any()
        _fill[(8,)](out, 3)
        assert (out == 3).all()
    assert len(cache) == 2
    _fill[(8,)](out, 4)
    assert (out == 4).all() and len(cache) == 2


def test_what_does_not_compile_is_said_when_it_is_launched() -> None:
    @triton.jit
    def wrong(out: tl.tensor) -> None:
        tl.store(out, tl.arange(0, 3))

    with compiling() as compile_only, compile_only():
        wrong[(1,)](torch.zeros(4, device="cuda"))
    with pytest.raises(Exception, match="arange"):
        wrong[(1,)](torch.zeros(4, device="cuda"))
    out = torch.zeros(8, device="cuda")
    _fill[(8,)](out, 5)
    assert (out == 5).all()
