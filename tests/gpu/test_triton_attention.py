"""Triton attention in bfloat16 on a GPU, against the reference kernels in float32 on the same numbers."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, Operation, OpKind, Resource, Scope
from nanoflow.kernels import gluon_attention, reference, triton_attention
from nanoflow.kernels.launch import KEY_BLOCK, BatchInputs, DecodeInputs, HostLengths, Launch, LayerCache
from tests import graphs

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
CHUNKS = [(0, 700), (512, 300), (1500, 2), (0, 1), (37, 129), (2000, 257)]
HEADS = [(32, 8, 128), (32, 8, 64), (28, 4, 128), (32, 32, 128), (8, 1, 256)]


def _decodes(num: int, longest: int) -> list[tuple[int, int]]:
    return [(int(before), 1) for before in np.random.default_rng(num).integers(0, longest, num)]


def _inputs(requests: list[tuple[int, int]], num_decodes: int, monkeypatch: pytest.MonkeyPatch) -> BatchInputs:
    monkeypatch.setattr(graphs, "PAGE_SIZE", 16)
    batch = graphs.batch_of(requests, num_decodes, 10, seed=1)
    return InputBuilder(RopeSpec(inv_freq=(1.0,)), num_rows=len(requests), device=GPU).build(batch)


def _dims(heads: tuple[int, int, int], window: int | None) -> AttentionDims:
    num_heads, num_kv_heads, head_dim = heads
    return AttentionDims(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=head_dim**-0.5, windows=(window,)
    )


def _cache(inputs: BatchInputs, dims: AttentionDims) -> LayerCache:
    tables = torch.cat((inputs.decodes.page_tables, inputs.prefills.page_tables))
    shape = (int(tables.max()) + 1, dims.num_kv_heads, 16, dims.head_dim)
    keys, values = (torch.randn(shape, device=GPU).bfloat16() for _ in range(2))
    return LayerCache(keys=keys, values=values)


def _launch(
    scope: Scope, dims: AttentionDims, tokens: TokenRange, q: torch.Tensor, inputs: BatchInputs, cache: LayerCache
) -> Launch:
    kind = OpKind.DECODE_ATTENTION if scope is Scope.DECODE else OpKind.PREFILL_ATTENTION
    op = Operation(
        name="attention", kind=kind, resource=Resource.MEMORY, scope=scope, reads=("q",), writes=("o",), dims=dims
    )
    out = torch.full_like(q, torch.nan)
    return Launch(op=op, layer=0, tokens=tokens, reads=(q,), writes=(out,), weights=(), inputs=inputs, cache=cache)


def _exact(launch: Launch) -> torch.Tensor:
    """The reference twin's output in float32."""
    assert launch.cache is not None
    (q,) = launch.reads
    twin = dataclasses.replace(
        launch,
        reads=(q.float(),),
        writes=(torch.full_like(q, torch.nan, dtype=torch.float32),),
        cache=LayerCache(keys=launch.cache.keys.float(), values=launch.cache.values.float()),
    )
    kernels = {
        OpKind.DECODE_ATTENTION: reference.decode_attention,
        OpKind.PREFILL_ATTENTION: reference.prefill_attention,
    }
    kernels[launch.op.kind](twin)
    return twin.writes[0]


def _assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Rounding the output costs 2^-9 of it, rounding the weights 2^-9 of a mean of |values| (all below about 5)."""
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=0.01)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize(("num", "longest"), [(300, 900), (48, 3000), (2, 20000)])
@pytest.mark.parametrize("kernels", [triton_attention, gluon_attention], ids=["triton", "gluon"])
def test_decode(
    kernels: ModuleType,
    heads: tuple[int, int, int],
    window: int | None,
    num: int,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, dims = _inputs(_decodes(num, longest), num, monkeypatch), _dims(heads, window)
    if kernels is gluon_attention and not gluon_attention.can_attend(GPU, torch.bfloat16, dims):
        pytest.skip("not for these heads")
    q = torch.randn(num, dims.q_width, device=GPU).bfloat16()
    launch = _launch(Scope.DECODE, dims, TokenRange(start=0, stop=num), q, inputs, _cache(inputs, dims))
    kernels.decode_attention(launch)
    _assert_close(launch.writes[0], _exact(launch))


@pytest.mark.parametrize("num_programs", [1, 7, 72, 396])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_any_number_of_programs_shares_the_work(num_programs: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skewed contexts, rows that are no decodes in between, NaN behind every context; the second half of the rows."""
    num, dims = 61, _dims((4 * group, 4, 128), None)
    if not gluon_attention.can_attend(GPU, torch.bfloat16, dims):
        pytest.skip("the kernel is for Hopper")
    contexts = [0 if row % 5 == 4 else 1 + int(9000 / (1 + row) ** 1.2) for row in range(num)]
    inputs = _inputs([(max(context - 1, 0), 1) for context in contexts], num, monkeypatch)
    cache = _cache(inputs, dims)
    for row, context in enumerate(contexts):
        if context % 16:
            page = int(inputs.decodes.page_tables[row, context // 16])
            cache.keys[page, :, context % 16 :] = cache.values[page, :, context % 16 :] = torch.nan
    decodes = with_contexts(inputs.decodes, torch.tensor(contexts, dtype=torch.int32, device=GPU))
    inputs = dataclasses.replace(
        inputs,
        decodes=decodes,
        host=HostLengths(decode_context_len=contexts, prefill_query_start=[num], prefill_context_len=[]),
    )
    for tokens in (TokenRange(start=0, stop=num), TokenRange(start=20, stop=num)):
        q = torch.randn(tokens.num_tokens, dims.q_width, device=GPU).bfloat16()
        launch = _launch(Scope.DECODE, dims, tokens, q, inputs, cache)
        gluon_attention.run_decode(launch, num_programs)
        clean = LayerCache(keys=cache.keys.nan_to_num(), values=cache.values.nan_to_num())
        exact = _exact(dataclasses.replace(launch, cache=clean))
        is_decode = torch.tensor(contexts[tokens.start :], device=GPU) > 0
        _assert_close(launch.writes[0][is_decode], exact[is_decode])
        assert launch.writes[0][~is_decode].isnan().all()


def with_contexts(decodes: DecodeInputs, contexts: torch.Tensor) -> DecodeInputs:
    """The same requests with other contexts."""
    blocks = torch.nn.functional.pad(((contexts + KEY_BLOCK - 1) // KEY_BLOCK).cumsum(0), (1, 0)).int()
    return dataclasses.replace(decodes, context_len=contexts, key_blocks=blocks)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 500])
def test_prefill(heads: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, dims = _inputs(_decodes(7, 400) + CHUNKS, 7, monkeypatch), _dims(heads, window)
    cache = _cache(inputs, dims)
    for tokens in (TokenRange(start=7, stop=650), TokenRange(start=650, stop=inputs.num_tokens)):
        q = torch.randn(tokens.num_tokens, dims.q_width, device=GPU).bfloat16()
        launch = _launch(Scope.PREFILL, dims, tokens, q, inputs, cache)
        triton_attention.prefill_attention(launch)
        _assert_close(launch.writes[0], _exact(launch))


def test_one_cuda_graph_serves_other_lengths_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    num_decodes, dims = 40, _dims((32, 8, 128), None)
    inputs = _inputs(_decodes(num_decodes, 2000) + CHUNKS, num_decodes, monkeypatch)
    cache, q = _cache(inputs, dims), torch.randn(inputs.num_tokens, dims.q_width, device=GPU).bfloat16()
    decode_tokens = TokenRange(start=0, stop=num_decodes)
    prefill_tokens = TokenRange(start=num_decodes, stop=inputs.num_tokens)
    decode = _launch(Scope.DECODE, dims, decode_tokens, q[:num_decodes], inputs, cache)
    prefill = _launch(Scope.PREFILL, dims, prefill_tokens, q[num_decodes:], inputs, cache)
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
    _assert_close(decode.writes[0][1::2], _exact(dataclasses.replace(decode, inputs=now))[1::2])
    chunks = TokenRange(start=first, stop=end)
    exact = _exact(dataclasses.replace(prefill, inputs=now, tokens=chunks, reads=(q[first:end],)))
    _assert_close(prefill.writes[0][: end - first], exact)
    assert prefill.writes[0][end - first :].isnan().all()
