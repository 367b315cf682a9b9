"""Keys and values in 8 bits for tests: caches in both forms, and long contexts in which attention has to find a key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, KvType, Scope
from nanoflow.kernels.kv_fp8 import FP8, SCALE, dequantised, quantised
from nanoflow.kernels.launch import Launch, LayerCache
from tests.attention_cases import PAGE_TOKENS, dims_of, exact, inputs_of, launch_of, without_nan

# Largest error of a retrieved value, of the largest one. The tests of the bound say which faults exceed it.
NEEDLE_BOUND = 0.03


def in_8_bits(cache: LayerCache) -> LayerCache:
    """The same keys and values, rounded."""
    keys, key_scales = quantised(cache.keys)
    values, value_scales = quantised(cache.values)
    scales = torch.stack((key_scales, value_scales), dim=-1).contiguous()
    return LayerCache(keys=keys, values=values, scales=scales, group=cache.group)


def in_16_bits(cache: LayerCache, dtype: torch.dtype) -> LayerCache:
    """The numbers that a cache in 8 bits stands for."""
    assert cache.scales is not None
    return LayerCache(
        keys=dequantised(cache.keys, cache.scales[..., 0], dtype),
        values=dequantised(cache.values, cache.scales[..., 1], dtype),
        group=cache.group,
    )


def poison_8_bits(shape: tuple[int, ...], device: torch.device) -> LayerCache:
    """A cache [N, K, G, D] of NaN."""
    keys, values = (torch.full(shape, torch.nan, device=device).to(FP8) for _ in range(2))
    return LayerCache(
        keys=keys, values=values, scales=torch.full((*shape[:3], 2), torch.nan, dtype=SCALE, device=device)
    )


def on_8_bits(launch: Launch) -> Launch:
    """The same attention on rounded keys and values."""
    assert isinstance(launch.op.dims, AttentionDims) and launch.cache is not None
    dims = dataclasses.replace(launch.op.dims, kv_type=KvType.FP8)
    return dataclasses.replace(launch, op=dataclasses.replace(launch.op, dims=dims), cache=in_8_bits(launch.cache))


def with_sinks(launch: Launch) -> Launch:
    """The same attention with sinks: some take nearly all of a softmax, some about as much as a key, some nothing."""
    dims = launch.op.dims
    assert isinstance(dims, AttentionDims)
    sinks = torch.tensor([9.0, 0.5, -9.0, 2.0, 3.0, -1.0, 200.0, -200.0], device=launch.reads[0].device)
    changed = dataclasses.replace(launch.op, dims=dataclasses.replace(dims, has_sinks=True))
    return dataclasses.replace(launch, op=changed, weights=(sinks.repeat(dims.num_heads)[: dims.num_heads],))


def assert_decoded_from_8_bits(launch: Launch) -> None:
    """Check that a result is that of the numbers that are stored, and that rows that are no decodes were not written.

    A result may differ by a digit of its type, and by the rounding of weights to float16, of which a digit is small.
    """
    assert launch.cache is not None
    expected = exact(dataclasses.replace(launch, cache=without_nan(in_16_bits(launch.cache, torch.float32))))
    is_decode = launch.inputs.decodes.context_len[launch.tokens.start : launch.tokens.stop] > 0
    ours, theirs = launch.writes[0][is_decode].float(), expected[is_decode]
    torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=2**-9)
    assert launch.writes[0][~is_decode].isnan().all()


def of_all_sizes(launch: Launch) -> Launch:
    """The same attention on 8 bits, with pages of values and rows of queries that are much smaller and larger.

    Results are in float32, so that only what the kernel itself rounds is seen.
    """
    (q,), cache = launch.reads, launch.cache
    assert cache is not None
    sizes = torch.logspace(-12, 3, len(cache.values), device=q.device)[:, None, None, None]
    queries = q * torch.logspace(-6, 0.5, len(q), device=q.device)[:, None]
    return dataclasses.replace(
        on_8_bits(
            dataclasses.replace(launch, cache=dataclasses.replace(cache, values=cache.values * sizes.bfloat16()))
        ),
        reads=(queries.to(q.dtype),),
        writes=(torch.full_like(q, torch.nan, dtype=torch.float32),),
    )


def assert_decoded_in_float32(launch: Launch) -> None:
    """Check a result of `of_all_sizes`, relative to the largest element of each head."""
    dims, cache = launch.op.dims, launch.cache
    assert isinstance(dims, AttentionDims) and cache is not None
    expected = exact(dataclasses.replace(launch, cache=without_nan(in_16_bits(cache, torch.float32))))
    heads = expected.view(len(expected), dims.num_heads, dims.head_dim)
    error = (launch.writes[0].view_as(heads) - heads).abs()
    assert (error <= 2**-9 * heads.abs().amax(-1, keepdim=True)).all()


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A launch in which each query has to find one of many keys.

    Attributes:
        launch: Attention on a cache in 8 bits.
        exact: Its result in float32 with the keys and values before rounding.
        codes: float32 [keys, head size], signs of the value of each key, by which a result tells what was found.
        places: int64 [queries], the keys to find.
    """

    launch: Launch
    exact: Tensor
    codes: Tensor
    places: Tensor

    def error(self, out: Tensor) -> float:
        """Largest error of a result, of the largest exact one."""
        return float((out.float() - self.exact).abs().max() / self.exact.abs().max())

    def num_found(self, out: Tensor) -> int:
        """Queries whose result is nearest to the value of their key."""
        centred = out.float().view(len(self.places), -1)[:, : self.codes.shape[1]] - _VALUE_OFFSET
        return int(((centred @ self.codes.T).argmax(-1) == self.places).sum())


_VALUE_OFFSET = 0.0015


def needle_case(
    scope: Scope,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> Needle:
    """As in trained models, one dimension of all keys is large and one small, and values are small.

    A query gives its key two fifths of all weight and the other keys the rest, so that sums over many small weights
    count too.
    """
    generator, head_dim = torch.Generator().manual_seed(0), 128

    def signs() -> Tensor:
        return torch.randint(0, 2, (num_keys, head_dim), generator=generator) * 2.0 - 1.0

    keys, codes = signs(), signs()
    places = torch.randperm(num_keys - num_queries, generator=generator)[:num_queries]
    q = 0.8 * keys[places]
    keys *= 0.5 + torch.rand(keys.shape, generator=generator)
    keys[:, 5], keys[:, 70] = 60 + torch.randn(num_keys, generator=generator), keys[:, 70] * 0.01
    q[:, 5] = 0.02
    values = 0.003 * codes + _VALUE_OFFSET
    dims = dataclasses.replace(dims_of((2, 1, head_dim), None), kv_type=KvType.FP8)
    is_decode = scope is Scope.DECODE
    requests = [(num_keys - 1, 1)] * num_queries if is_decode else [(num_keys - num_queries, num_queries)]
    inputs = inputs_of(requests, num_queries if is_decode else 0, device, monkeypatch)
    # All requests read the same pages.
    num_pages = -(-num_keys // PAGE_TOKENS)
    table = torch.randperm(num_pages, generator=generator).int().to(device)
    tables = table.expand(len(requests), -1).contiguous()
    name = "decode_tables" if is_decode else "prefill_tables"
    inputs = dataclasses.replace(inputs, pages=(dataclasses.replace(inputs.pages[0], **{name: tables}),))
    pages = torch.zeros(2, num_pages * PAGE_TOKENS, head_dim)
    pages[0, :num_keys], pages[1, :num_keys] = keys, values
    paged = torch.empty(2, num_pages, 1, PAGE_TOKENS, head_dim, device=device)
    paged[:, table.long()] = pages.view(2, num_pages, 1, PAGE_TOKENS, head_dim).to(device)
    queries = q.repeat(1, 2).to(device, dtype)
    tokens = TokenRange(start=0, stop=num_queries)
    launch = launch_of(scope, dims, tokens, queries, inputs, in_8_bits(LayerCache(keys=paged[0], values=paged[1])))
    return Needle(
        launch=launch,
        exact=_attention(queries.float().cpu()[:, :head_dim], keys, values, dims.scale, is_decode)
        .repeat(1, 2)
        .to(device),
        codes=codes.to(device),
        places=places.to(device),
    )


def _attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, sees_all: bool) -> Tensor:
    """Attention of queries, the last tokens of the context, or all at its last one."""
    scores = q @ keys.T * scale
    if not sees_all:
        places = torch.arange(len(keys) - len(q), len(keys))
        scores.masked_fill_(torch.arange(len(keys)) > places[:, None], -torch.inf)
    return torch.softmax(scores, -1) @ values
