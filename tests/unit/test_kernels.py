"""Reference kernels against definitions written as loops, on fresh random inputs with poisoned outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanoflow.batch import NewPages
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, LinearDims, Operation, OpKind, Resource, Scope
from nanoflow.kernels import cpu, reference
from nanoflow.kernels.dispatch import Kernels
from nanoflow.kernels.launch import BatchInputs, Launch, LayerCache
from tests.graphs import PAGE_SIZE, batch_of

HEADS, KV_HEADS, DIM = 6, 2, 8
CPU = torch.device("cpu")


def _operation(kind: OpKind, scope: Scope, window: int | None) -> Operation:
    dims = AttentionDims(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, scale=0.3, window=window)
    return Operation(
        name="attention",
        kind=kind,
        resource=Resource.MEMORY,
        scope=scope,
        reads=("q", "kv"),
        writes=("attn",),
        dims=dims,
    )


def _cache(num_pages: int) -> LayerCache:
    """Random keys and values; pages that no request has hold NaN-free garbage of another scale."""
    generator = torch.Generator().manual_seed(7)
    shape = (num_pages, KV_HEADS, PAGE_SIZE, DIM)
    return LayerCache(keys=torch.randn(shape, generator=generator), values=torch.randn(shape, generator=generator))


def _key_value(cache: LayerCache, table: torch.Tensor, place: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    page, offset = int(table[place // PAGE_SIZE]), place % PAGE_SIZE
    return cache.keys[page, head, offset], cache.values[page, head, offset]


def _attend(q: torch.Tensor, cache: LayerCache, table: torch.Tensor, place: int, window: int | None) -> torch.Tensor:
    """One token at `place`, key by key."""
    first = 0 if window is None else max(0, place - window + 1)
    heads = []
    for head in range(HEADS):
        pairs = [_key_value(cache, table, key, head // (HEADS // KV_HEADS)) for key in range(first, place + 1)]
        weights = torch.softmax(torch.stack([0.3 * torch.dot(q[head], key) for key, _ in pairs]), 0)
        heads.append(sum(weight * value for weight, (_, value) in zip(weights, pairs, strict=True)))
    return torch.stack([torch.as_tensor(head) for head in heads]).flatten()


def _inputs(requests: list[tuple[int, int]], num_decodes: int) -> BatchInputs:
    rope = RopeSpec(inv_freq=tuple(0.5**i for i in range(DIM // 2)))
    return InputBuilder((rope,), num_rows=len(requests), device=CPU).build(batch_of(requests, num_decodes, 10, seed=3))


REQUESTS = [(0, 1), (5, 1), (11, 1), (0, 7), (6, 3), (2, 1)]
NUM_DECODES = 3


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("limit", [1, 1 << 24])
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_decode_attention(window: int | None, limit: int, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAX_GATHERED_ELEMENTS", limit)
    inputs, cache = _inputs(REQUESTS, NUM_DECODES), _cache(64)
    q = torch.randn(NUM_DECODES, HEADS * DIM)
    out = torch.full_like(q, torch.nan)
    for tokens in (TokenRange(start=0, stop=cut), TokenRange(start=cut, stop=NUM_DECODES)):
        if tokens.num_tokens:
            _launch(OpKind.DECODE_ATTENTION, Scope.DECODE, window, tokens, q, out, inputs, cache)
    for i, (before, _) in enumerate(REQUESTS[:NUM_DECODES]):
        expected = _attend(q[i].view(HEADS, DIM), cache, inputs.pages[0].decode_tables[i], before, window)
        torch.testing.assert_close(out[i], expected)


def _is_seen(inputs: BatchInputs, requests: list[tuple[int, int]], num_pages: int, window: int | None) -> torch.Tensor:
    """Places that a query of these requests sees, bool [num_pages, PAGE_SIZE]."""
    tables = torch.cat((inputs.pages[0].decode_tables, inputs.pages[0].prefill_tables))
    is_seen = torch.zeros(num_pages, PAGE_SIZE, dtype=torch.bool)
    for table, (before, count) in zip(tables, requests, strict=True):
        places = torch.arange(0 if window is None else max(before - window + 1, 0), before + count)
        is_seen[table[places // PAGE_SIZE].long(), places % PAGE_SIZE] = True
    return is_seen


@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("requests", [REQUESTS, [(40, 1), (41, 1), (9, 1), (30, 7), (44, 2)]])
def test_attention_reads_nothing_but_what_its_queries_see(requests: list[tuple[int, int]], window: int | None) -> None:
    """What lies behind a context or before a window is another request's and may not be finite."""
    inputs, cache = _inputs(requests, NUM_DECODES), _cache(128)
    q = torch.randn(inputs.num_tokens, HEADS * DIM)
    clean, out = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)

    def attend(result: torch.Tensor) -> None:
        decodes, prefills = TokenRange(start=0, stop=NUM_DECODES), TokenRange(start=NUM_DECODES, stop=len(q))
        _launch(OpKind.DECODE_ATTENTION, Scope.DECODE, window, decodes, q, result, inputs, cache)
        _launch(OpKind.PREFILL_ATTENTION, Scope.PREFILL, window, prefills, q, result, inputs, cache)

    attend(clean)
    is_seen = _is_seen(inputs, requests, len(cache.keys), window)
    for part in (cache.keys, cache.values):
        part.masked_fill_(~is_seen[:, None, :, None], torch.nan)
    attend(out)
    assert clean.isfinite().all()
    torch.testing.assert_close(out, clean)


def test_decodes_are_grouped_by_length() -> None:
    """A long one does not make the short ones as long; a context of 0 is no decode; no group reads too many keys."""
    groups = list(reference._groups([3, 1, 400, 0, 2, 0, 8, 390, 5, 4], 2, 20))
    assert groups == [[0, 9], [1, 4], [2], [7], [6, 8]]


def test_a_group_reads_as_many_keys_as_it_may() -> None:
    assert list(reference._groups([4] * 7, 2, 12)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(reference._groups([4] * 7, 2, 1 << 20)) == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("window", [None, 2, 64])
def test_decodes_of_all_lengths_in_any_order_are_their_own(window: int | None) -> None:
    """Long and short ones apart, with rows between that are no decodes."""
    requests = [(before, 1) for before in (0, 37, 3, 14, 2, 61, 1, 30)]
    inputs, cache = _inputs(requests, len(requests)), _cache(256)
    q = torch.randn(len(requests), HEADS * DIM)
    tokens, out = TokenRange(start=0, stop=len(requests)), torch.full_like(q, torch.nan)
    _launch(OpKind.DECODE_ATTENTION, Scope.DECODE, window, tokens, q, out, inputs, cache)
    for i, (before, _) in enumerate(requests):
        expected = _attend(q[i].view(HEADS, DIM), cache, inputs.pages[0].decode_tables[i], before, window)
        torch.testing.assert_close(out[i], expected)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("cut", [3, 5, 9, 11, 14])
def test_prefill_attention_cut_anywhere(window: int | None, cut: int) -> None:
    inputs, cache = _inputs(REQUESTS, NUM_DECODES), _cache(64)
    q = torch.randn(inputs.num_tokens, HEADS * DIM)
    out = torch.full_like(q, torch.nan)
    for tokens in (TokenRange(start=NUM_DECODES, stop=cut), TokenRange(start=cut, stop=inputs.num_tokens)):
        if tokens.num_tokens:
            _launch(OpKind.PREFILL_ATTENTION, Scope.PREFILL, window, tokens, q, out, inputs, cache)
    assert out[:NUM_DECODES].isnan().all()
    for request, (before, count) in enumerate(REQUESTS[NUM_DECODES:]):
        for i in range(count):
            token = int(inputs.prefills.query_start[request]) + i
            expected = _attend(
                q[token].view(HEADS, DIM), cache, inputs.pages[0].prefill_tables[request], before + i, window
            )
            torch.testing.assert_close(out[token], expected)


def _launch(
    kind: OpKind,
    scope: Scope,
    window: int | None,
    tokens: TokenRange,
    q: torch.Tensor,
    out: torch.Tensor,
    inputs: BatchInputs,
    cache: LayerCache,
) -> None:
    rows = slice(tokens.start, tokens.stop)
    reference.REFERENCE_KERNELS[kind](
        Launch(
            op=_operation(kind, scope, window),
            layer=0,
            tokens=tokens,
            reads=(q[rows],),
            writes=(out[rows],),
            weights=(),
            inputs=inputs,
            cache=cache,
        )
    )


def test_rope_append_rotates_and_fills_its_slots_only() -> None:
    inputs, cache = _inputs(REQUESTS, NUM_DECODES), _cache(64)
    before_keys, before_values = cache.keys.clone(), cache.values.clone()
    qkv = torch.randn(inputs.num_tokens, (HEADS + 2 * KV_HEADS) * DIM)
    q = torch.full((inputs.num_tokens, HEADS * DIM), torch.nan)
    tokens = TokenRange(start=1, stop=6)
    rows = slice(tokens.start, tokens.stop)
    op = _operation(OpKind.ROPE_APPEND, Scope.ALL, None)
    reference.rope_append(
        Launch(
            op=op,
            layer=0,
            tokens=tokens,
            reads=(qkv[rows],),
            writes=(q[rows],),
            weights=(),
            inputs=inputs,
            cache=cache,
            rotation=inputs.rotations[0],
        )
    )
    positions = [before + i for before, count in REQUESTS for i in range(count)]
    for token in range(tokens.start, tokens.stop):
        heads = qkv[token].view(-1, DIM)
        rotated = torch.stack([_rotated(head, positions[token]) for head in heads[: HEADS + KV_HEADS]])
        torch.testing.assert_close(q[token], rotated[:HEADS].flatten())
        page, offset = divmod(int(inputs.pages[0].slots[token]), PAGE_SIZE)
        torch.testing.assert_close(cache.keys[page, :, offset], rotated[HEADS:])
        torch.testing.assert_close(cache.values[page, :, offset], heads[HEADS + KV_HEADS :])
        cache.keys[page, :, offset], cache.values[page, :, offset] = (
            before_keys[page, :, offset],
            before_values[page, :, offset],
        )
    assert torch.equal(cache.keys, before_keys) and torch.equal(cache.values, before_values)
    assert q[0].isnan().all() and q[6:].isnan().all()


def _rotated(head: torch.Tensor, position: int) -> torch.Tensor:
    half = DIM // 2
    out = torch.empty(DIM)
    for i in range(half):
        angle = position * 0.5**i
        x, y = float(head[i]), float(head[i + half])
        out[i], out[i + half] = x * math.cos(angle) - y * math.sin(angle), y * math.cos(angle) + x * math.sin(angle)
    return out


def test_fed_back_tokens_are_the_last_sampled_ones_of_their_rows() -> None:
    batch = batch_of([(4, 1), (9, 1), (0, 3)], 2, 10, seed=0)
    batch.is_fed_back[[0, 1]] = True
    builder = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=8, device=CPU)
    builder.feed_back(np.array([1, 0], np.int32), torch.tensor([71, 70]))
    assert builder.build(batch).token_ids.tolist() == [70, 71, *batch.token_ids[2:].tolist()]


def test_page_tables_stay_and_a_batch_brings_only_what_is_new() -> None:
    first, later = batch_of([(4, 1), (9, 1), (0, 3)], 2, 10, seed=0), batch_of([(5, 1), (40, 1), (3, 2)], 2, 10, seed=0)
    new = NewPages(
        rows=np.array([1, 2], np.int32), columns=np.array([2, 0], np.int32), pages=np.array([70, 80], np.int32)
    )
    builder = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=8, device=CPU, pages_per_row=1)
    width = first.table_width
    tables = torch.from_numpy(first.new_pages.pages).view(3, width)
    inputs = builder.build(first)
    assert inputs.pages[0].decode_tables.tolist() == tables[:2].tolist()
    assert inputs.pages[0].prefill_tables.tolist() == tables[2:].tolist()
    # Wider than the table was; the requests stand in another order; row 2 has another tenant.
    later = replace(later, new_pages=new, table_width=2 * width + 1, rows=np.array([2, 1, 0], np.int32))
    inputs = builder.build(later)
    assert inputs.pages[0].decode_tables[:, 0].tolist() == [80, int(tables[1, 0])]
    assert int(inputs.pages[0].decode_tables[1, 2]) == 70 and inputs.pages[0].decode_tables.shape == (2, 2 * width + 1)
    assert inputs.pages[0].prefill_tables[0, :width].tolist() == tables[0].tolist()
    assert int(inputs.pages[0].decode_tables.max()) <= 80 and int(inputs.pages[0].decode_tables.min()) >= 0


@pytest.mark.skipif(not cpu.has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_cpu_product_is_the_reference_product(dtype: torch.dtype, num_tokens: int, has_bias: bool) -> None:
    x, weight = torch.randn(num_tokens, 96, dtype=dtype), torch.randn(80, 96, dtype=dtype)
    weights = (weight, torch.randn(80, dtype=dtype)) if has_bias else (weight,)
    op = Operation(
        name="linear",
        kind=OpKind.LINEAR,
        resource=Resource.COMPUTE,
        reads=("x",),
        writes=("y",),
        dims=LinearDims(in_features=96, out_features=80),
    )
    tokens, inputs = TokenRange(start=0, stop=num_tokens), _inputs([(0, 1)], 1)
    results = []
    for kernels in (cpu.CPU_KERNELS, reference.REFERENCE_KERNELS):
        out = torch.full((num_tokens, 80), torch.nan, dtype=dtype)
        launch = Launch(
            op=op, layer=0, tokens=tokens, reads=(x,), writes=(out,), weights=weights, inputs=inputs, cache=None
        )
        kernels[OpKind.LINEAR](launch)
        results.append(out)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernels", [cpu.CPU_KERNELS, reference.REFERENCE_KERNELS], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_add_adds_to_its_rows(kernels: Kernels, dtype: torch.dtype, num_tokens: int, has_bias: bool) -> None:
    """Rows before and behind stay what they are; it looks at the residual through one view and writes another."""
    x, weight = torch.randn(num_tokens, 96, dtype=dtype), torch.randn(80, 96, dtype=dtype)
    bias = torch.randn(80, dtype=dtype)
    stream = torch.randn(num_tokens + 2, 80, dtype=dtype)
    expected = stream.double()
    expected[1:-1] += x.double() @ weight.double().t() + (bias.double() if has_bias else 0.0)
    op = Operation(
        name="linear_add",
        kind=OpKind.LINEAR_ADD,
        resource=Resource.COMPUTE,
        reads=("x", "hidden"),
        writes=("hidden",),
        dims=LinearDims(in_features=96, out_features=80),
    )
    kernels[OpKind.LINEAR_ADD](
        Launch(
            op=op,
            layer=0,
            tokens=TokenRange(start=1, stop=num_tokens + 1),
            reads=(x, stream[1:-1]),
            writes=(stream[1:-1],),
            weights=(weight, bias) if has_bias else (weight,),
            inputs=_inputs([(0, 1)], 1),
            cache=None,
        )
    )
    rtol = 1e-4 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(stream.double(), expected, rtol=rtol, atol=5 * rtol)
