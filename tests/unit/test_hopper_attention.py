"""Decode attention in Gluon is compiled for Hopper, which needs no card; what it computes is tested on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon")

# Shared memory and registers of a Hopper SM, and the shared memory that each program takes besides its own.
_SM_BYTES, _SM_REGISTERS, _RESERVED_BYTES = 228 << 10, 1 << 16, 1 << 10
_PROGRAMS_PER_SM = 3


@pytest.mark.parametrize(("group", "head_dim"), [(4, 128), (8, 64)])
def test_it_compiles_and_three_programs_fit_on_an_sm(group: int, head_dim: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_hopper_attention", str(group), str(head_dim)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # Queries are columns of the products, the fewest there are.
    assert report["has_columns_of_queries"] and report["has_tma"]
    assert _PROGRAMS_PER_SM * (report["shared_bytes"] + _RESERVED_BYTES) <= _SM_BYTES
    assert _PROGRAMS_PER_SM * report["registers"] <= _SM_REGISTERS
