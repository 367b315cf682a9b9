"""Triton attention in bfloat16 on a GPU, against the reference kernels in float32 on the same numbers."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Scope
from nanoflow.kernels import triton_attention
from nanoflow.kernels.hopper import attention as hopper_attention
from nanoflow.kernels.launch import HostLengths
from tests.attention_cases import (
    assert_close,
    assert_decoded,
    cache_of,
    decode_case,
    dims_of,
    exact,
    inputs_of,
    launch_of,
)

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
CHUNKS = [(0, 700), (512, 300), (1500, 2), (0, 1), (37, 129), (2000, 257)]
HEADS = [(32, 8, 128), (32, 8, 64), (28, 4, 128), (32, 32, 128), (8, 1, 256)]


def _decodes(num: int, longest: int) -> list[tuple[int, int]]:
    return [(int(before), 1) for before in np.random.default_rng(num).integers(0, longest, num)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize(("num", "longest"), [(300, 900), (48, 3000), (2, 20000)])
@pytest.mark.parametrize("kernels", [triton_attention, hopper_attention], ids=["triton", "gluon"])
def test_decode(
    kernels: ModuleType,
    heads: tuple[int, int, int],
    window: int | None,
    num: int,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, dims = inputs_of(_decodes(num, longest), num, GPU, monkeypatch), dims_of(heads, window)
    if kernels is hopper_attention and not hopper_attention.can_attend(GPU, torch.bfloat16, dims):
        pytest.skip("not for these heads")
    q = torch.randn(num, dims.q_width, device=GPU).bfloat16()
    launch = launch_of(Scope.DECODE, dims, TokenRange(start=0, stop=num), q, inputs, cache_of(inputs, dims))
    kernels.decode_attention(launch)
    assert_close(launch.writes[0], exact(launch))


@pytest.mark.parametrize("num_programs", [1, 7, 72, 396])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_any_number_of_programs_shares_the_work(num_programs: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skewed contexts, rows that are no decodes in between, NaN behind every context; the second half of the rows."""
    num, heads = 61, (4 * group, 4, 128)
    if not hopper_attention.can_attend(GPU, torch.bfloat16, dims_of(heads, None)):
        pytest.skip("the kernel is for Hopper")
    contexts = [0 if row % 5 == 4 else 1 + int(9000 / (1 + row) ** 1.2) for row in range(num)]
    for first in (0, 20):
        launch = decode_case(contexts, heads, GPU, monkeypatch, first)
        hopper_attention.run_decode(launch, num_programs)
        assert_decoded(launch)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 500])
def test_prefill(heads: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, dims = inputs_of(_decodes(7, 400) + CHUNKS, 7, GPU, monkeypatch), dims_of(heads, window)
    cache = cache_of(inputs, dims)
    for tokens in (TokenRange(start=7, stop=650), TokenRange(start=650, stop=inputs.num_tokens)):
        q = torch.randn(tokens.num_tokens, dims.q_width, device=GPU).bfloat16()
        launch = launch_of(Scope.PREFILL, dims, tokens, q, inputs, cache)
        triton_attention.prefill_attention(launch)
        assert_close(launch.writes[0], exact(launch))


def test_one_cuda_graph_serves_other_lengths_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    num_decodes, dims = 40, dims_of((32, 8, 128), None)
    inputs = inputs_of(_decodes(num_decodes, 2000) + CHUNKS, num_decodes, GPU, monkeypatch)
    cache, q = cache_of(inputs, dims), torch.randn(inputs.num_tokens, dims.q_width, device=GPU).bfloat16()
    decode_tokens = TokenRange(start=0, stop=num_decodes)
    prefill_tokens = TokenRange(start=num_decodes, stop=inputs.num_tokens)
    decode = launch_of(Scope.DECODE, dims, decode_tokens, q[:num_decodes], inputs, cache)
    prefill = launch_of(Scope.PREFILL, dims, prefill_tokens, q[num_decodes:], inputs, cache)
    tiles = triton_attention.PREFILL_TILES[-2]

    def run() -> None:
        triton_attention.decode_attention(decode)
        triton_attention.run_prefill(prefill, tiles)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # Half of the decodes become padding, the others shorter; two chunks now, the other requests padding.
    contexts = inputs.decodes.context_len
    contexts[::2] = 0
    contexts[1::2] = (contexts[1::2] + 1) // 2
    first, second, end = num_decodes, num_decodes + 600, num_decodes + 900
    inputs.prefills.query_start.copy_(torch.tensor([first, second, *[end] * (len(CHUNKS) - 1)]))
    inputs.prefills.context_len.copy_(torch.tensor([700, 812, *[0] * (len(CHUNKS) - 2)]))
    for launch in (decode, prefill):
        launch.writes[0].fill_(torch.nan)
    graph.replay()
    host = HostLengths(
        decode_context_len=[max(1, int(length)) for length in contexts],
        prefill_query_start=[first, second, end],
        prefill_context_len=[700, 812],
    )
    now = dataclasses.replace(inputs, host=host)
    assert decode.writes[0][::2].isnan().all()
    assert_close(decode.writes[0][1::2], exact(dataclasses.replace(decode, inputs=now))[1::2])
    chunks = TokenRange(start=first, stop=end)
    expected = exact(dataclasses.replace(prefill, inputs=now, tokens=chunks, reads=(q[first:end],)))
    assert_close(prefill.writes[0][: end - first], expected)
    assert prefill.writes[0][end - first :].isnan().all()
