"""Launches of attention on random inputs, their expected results, and products that may carry attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import KEY_BLOCK, AttentionDims, Operation, OpKind, Resource, Scope
from nanoflow.kernels import reference
from nanoflow.kernels.launch import BatchInputs, DecodeInputs, HostLengths, Launch, LayerCache
from tests import graphs
from tests.gemm_cases import exact_linear, exact_linear_swiglu, linear_add_case, linear_case, linear_swiglu_case

PAGE_TOKENS = 16


def inputs_of(
    requests: list[tuple[int, int]], num_decodes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> BatchInputs:
    """Inputs of requests given as (tokens in the cache, new tokens); the first `num_decodes` are decodes."""
    monkeypatch.setattr(graphs, "PAGE_SIZE", PAGE_TOKENS)
    batch = graphs.batch_of(requests, num_decodes, 10, seed=1)
    return InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=len(requests), device=device).build(batch)


def dims_of(heads: tuple[int, int, int], window: int | None) -> AttentionDims:
    """Attention with these numbers of query and KV heads, and this head size."""
    num_heads, num_kv_heads, head_dim = heads
    return AttentionDims(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=head_dim**-0.5, window=window
    )


def cache_of(inputs: BatchInputs, dims: AttentionDims) -> LayerCache:
    """Every page that the inputs name."""
    tables = torch.cat((inputs.pages[0].decode_tables, inputs.pages[0].prefill_tables))
    shape = (int(tables.max()) + 1, dims.num_kv_heads, PAGE_TOKENS, dims.head_dim)
    keys, values = (torch.randn(shape, device=tables.device).bfloat16() for _ in range(2))
    return LayerCache(keys=keys, values=values)


def launch_of(
    scope: Scope, dims: AttentionDims, tokens: TokenRange, q: torch.Tensor, inputs: BatchInputs, cache: LayerCache
) -> Launch:
    """A launch of the attention of this scope; its output is NaN."""
    kind = OpKind.DECODE_ATTENTION if scope is Scope.DECODE else OpKind.PREFILL_ATTENTION
    op = Operation(
        name="attention", kind=kind, resource=Resource.MEMORY, scope=scope, reads=("q",), writes=("o",), dims=dims
    )
    out = torch.full_like(q, torch.nan)
    return Launch(op=op, layer=0, tokens=tokens, reads=(q,), writes=(out,), weights=(), inputs=inputs, cache=cache)


def decode_case(
    contexts: list[int],
    heads: tuple[int, int, int],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    first: int = 0,
) -> Launch:
    """Decodes with these contexts from row `first` on, 0 for rows that are no decodes; slots after contexts are NaN."""
    requests = [(max(context - 1, 0), 1) for context in contexts]
    inputs, dims = inputs_of(requests, len(contexts), device, monkeypatch), dims_of(heads, None)
    cache = cache_of(inputs, dims)
    for row, context in enumerate(contexts):
        page, used = divmod(context, PAGE_TOKENS)
        if used:
            at = int(inputs.pages[0].decode_tables[row, page])
            cache.keys[at, :, used:] = cache.values[at, :, used:] = torch.nan
    inputs = dataclasses.replace(
        inputs,
        decodes=with_contexts(inputs.decodes, torch.tensor(contexts, dtype=torch.int32, device=device)),
        host=HostLengths(decode_context_len=contexts, prefill_query_start=[len(contexts)], prefill_context_len=[]),
    )
    tokens = TokenRange(start=first, stop=len(contexts))
    q = torch.randn(tokens.num_tokens, dims.q_width, device=device).bfloat16()
    return launch_of(Scope.DECODE, dims, tokens, q, inputs, cache)


def with_contexts(decodes: DecodeInputs, contexts: torch.Tensor) -> DecodeInputs:
    """The same requests with other contexts."""
    blocks = torch.nn.functional.pad(((contexts + KEY_BLOCK - 1) // KEY_BLOCK).cumsum(0), (1, 0)).int()
    return dataclasses.replace(decodes, context_len=contexts, key_blocks=blocks)


def exact(launch: Launch) -> torch.Tensor:
    """The output of the reference kernel in float32."""
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


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Rounding the output costs 2^-9 of it; rounding the weights 2^-9 of a mean of |values| (all below about 5)."""
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=0.01)


def without_nan(cache: LayerCache) -> LayerCache:
    """The same launch without the NaN after contexts."""
    return LayerCache(keys=cache.keys.nan_to_num(), values=cache.values.nan_to_num())


def assert_decoded(launch: Launch) -> None:
    """Check that the result of a `decode_case` is right, and that other rows were not written."""
    assert launch.cache is not None
    expected = exact(dataclasses.replace(launch, cache=without_nan(launch.cache)))
    is_decode = launch.inputs.decodes.context_len[launch.tokens.start : launch.tokens.stop] > 0
    assert_close(launch.writes[0][is_decode], expected[is_decode])
    assert launch.writes[0][~is_decode].isnan().all()


def carrier_case(
    kind: str, num_tokens: int, shape: tuple[int, int], device: torch.device
) -> tuple[Launch, torch.Tensor]:
    """A product in bfloat16, and its expected result; the kind is "linear", "bias", "add" or "swiglu"."""
    dtype = torch.bfloat16
    if kind == "swiglu":
        launch = linear_swiglu_case(num_tokens, shape, dtype, device)
        expected = exact_linear_swiglu(launch)
    elif kind == "add":
        launch, expected = linear_add_case(num_tokens, shape, dtype, device)
    else:
        launch = linear_case(num_tokens, shape, dtype, device, has_bias=kind == "bias")
        expected = exact_linear(launch)
    kind_of = {"swiglu": OpKind.LINEAR_SWIGLU, "add": OpKind.LINEAR_ADD}.get(kind, OpKind.LINEAR)
    return dataclasses.replace(launch, op=dataclasses.replace(launch.op, kind=kind_of)), expected
