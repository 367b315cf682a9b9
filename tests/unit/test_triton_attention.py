"""Triton attention against its reference twins, in Triton's interpreter on the CPU.

Whatever no query may see (other pages, places behind a context) is NaN in the cache that the Triton kernels get.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, Operation, OpKind, Resource, Scope
from nanoflow.kernels import reference, triton_attention
from nanoflow.kernels.launch import BatchInputs, Launch, LayerCache, PrefillInputs
from nanoflow.kernels.triton_attention import Tiles
from tests.all_cases import covering
from tests.graphs import PAGE_SIZE, batch_of

# The logarithm of an empty part's sum is -inf on purpose; NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")
CPU = torch.device("cpu")
DECODES = [(0, 1), (15, 1), (16, 1), (66, 1), (130, 1)]
CHUNKS = [(0, 37), (21, 9), (3, 1), (0, 16), (50, 33)]
SMALL = Tiles(block_m=16, block_n=16, num_warps=4, num_stages=2)


def _dims(group: int, head_dim: int, window: int | None) -> AttentionDims:
    return AttentionDims(num_heads=2 * group, num_kv_heads=2, head_dim=head_dim, scale=head_dim**-0.5, window=window)


def _inputs() -> BatchInputs:
    batch = batch_of(DECODES + CHUNKS, len(DECODES), 10, seed=3)
    return InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=len(batch.rows), device=CPU).build(batch)


def _caches(inputs: BatchInputs, dims: AttentionDims) -> tuple[LayerCache, LayerCache]:
    """Random keys and values; and the same with NaN wherever no query sees it, in no context or too far back."""
    page_tables = torch.cat((inputs.pages[0].decode_tables, inputs.pages[0].prefill_tables))
    contexts = torch.cat((inputs.decodes.context_len, inputs.prefills.context_len)).tolist()
    num_queries = [1] * len(inputs.decodes.context_len) + inputs.prefills.query_start.diff().tolist()
    shape = (int(page_tables.max()) + 3, dims.num_kv_heads, PAGE_SIZE, dims.head_dim)
    clean = LayerCache(keys=torch.randn(shape), values=torch.randn(shape))
    is_live = torch.zeros(shape[0], PAGE_SIZE, dtype=torch.bool)
    for table, context, count in zip(page_tables, contexts, num_queries, strict=True):
        places = torch.arange(max(context - count - dims.window + 1, 0) if dims.window else 0, context)
        is_live[table[places // PAGE_SIZE].long(), places % PAGE_SIZE] = True
    dead = ~is_live[:, None, :, None]
    return clean, LayerCache(
        keys=clean.keys.masked_fill(dead, torch.nan), values=clean.values.masked_fill(dead, torch.nan)
    )


def _launch(
    scope: Scope, dims: AttentionDims, tokens: TokenRange, q: torch.Tensor, inputs: BatchInputs, cache: LayerCache
) -> Launch:
    kind = OpKind.DECODE_ATTENTION if scope is Scope.DECODE else OpKind.PREFILL_ATTENTION
    op = Operation(
        name="attention", kind=kind, resource=Resource.MEMORY, scope=scope, reads=("q",), writes=("o",), dims=dims
    )
    rows = slice(tokens.start, tokens.stop)
    return Launch(
        op=op,
        layer=1,
        tokens=tokens,
        reads=(q[rows],),
        writes=(torch.full_like(q, torch.nan)[rows],),
        weights=(),
        inputs=inputs,
        cache=cache,
    )


@pytest.mark.parametrize(("window", "sizes", "splits"), covering([None, 1, 20], [(1, 32), (8, 16), (2, 24)], [1, 4]))
def test_decode(window: int | None, sizes: tuple[int, int], splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group, head_dim = sizes
    monkeypatch.setattr(triton_attention, "_MIN_SPLIT_TOKENS", 16)
    inputs, dims = _inputs(), _dims(group, head_dim, window)
    clean, poisoned = _caches(inputs, dims)
    q = torch.randn(len(DECODES), dims.q_width)
    for tokens in (TokenRange(start=0, stop=2), TokenRange(start=2, stop=len(DECODES))):
        ours = _launch(Scope.DECODE, dims, tokens, q, inputs, poisoned)
        twin = _launch(Scope.DECODE, dims, tokens, q, inputs, clean)
        triton_attention.run_decode(ours, SMALL, splits)
        reference.decode_attention(twin)
        torch.testing.assert_close(ours.writes[0], twin.writes[0])


@pytest.mark.parametrize("splits", [1, 2])
def test_decode_leaves_padding_alone(splits: int) -> None:
    inputs, dims = _inputs(), _dims(2, 16, None)
    _, poisoned = _caches(inputs, dims)
    lengths = inputs.decodes.context_len.clone()
    lengths[3:] = 0
    padded = dataclasses.replace(inputs, decodes=dataclasses.replace(inputs.decodes, context_len=lengths))
    q = torch.randn(len(DECODES), dims.q_width)
    launch = _launch(Scope.DECODE, dims, TokenRange(start=0, stop=len(DECODES)), q, padded, poisoned)
    triton_attention.run_decode(launch, SMALL, splits)
    assert launch.writes[0][:3].isfinite().all() and launch.writes[0][:3].all()
    assert launch.writes[0][3:].isnan().all()


@pytest.mark.parametrize(("window", "sizes", "cut"), covering([None, 1, 20], [(1, 32), (3, 16), (2, 24)], [0, 48]))
def test_prefill(window: int | None, sizes: tuple[int, int], cut: int) -> None:
    group, head_dim = sizes
    inputs, dims = _inputs(), _dims(group, head_dim, window)
    clean, poisoned = _caches(inputs, dims)
    q = torch.randn(inputs.num_tokens, dims.q_width)
    middle = len(DECODES) + cut
    ranges = (TokenRange(start=len(DECODES), stop=middle), TokenRange(start=middle, stop=inputs.num_tokens))
    for tokens in (tokens for tokens in ranges if tokens.num_tokens):
        ours = _launch(Scope.PREFILL, dims, tokens, q, inputs, poisoned)
        twin = _launch(Scope.PREFILL, dims, tokens, q, inputs, clean)
        triton_attention.run_prefill(ours, SMALL)
        reference.prefill_attention(twin)
        torch.testing.assert_close(ours.writes[0], twin.writes[0])


def test_prefill_with_padding_requests_and_tokens() -> None:
    inputs, dims, num_padding = _inputs(), _dims(2, 16, None), 25
    clean, poisoned = _caches(inputs, dims)
    q = torch.randn(inputs.num_tokens + num_padding, dims.q_width)
    live, all_tokens = TokenRange(start=5, stop=inputs.num_tokens), TokenRange(start=0, stop=len(q))
    # Two padding requests, one without a token and one with the padding tokens but for the last five; decodes before.
    starts, contexts = inputs.prefills.query_start.tolist(), inputs.prefills.context_len.tolist()
    prefills = PrefillInputs(
        query_start=torch.tensor([*starts, inputs.num_tokens, len(q) - 5], dtype=torch.int32),
        context_len=torch.tensor([*contexts, 0, 0], dtype=torch.int32),
    )
    tables = inputs.pages[0].prefill_tables
    pages = dataclasses.replace(inputs.pages[0], prefill_tables=torch.cat((tables, tables[:2])))
    padded = dataclasses.replace(inputs, prefills=prefills, pages=(pages,))
    ours = _launch(Scope.PREFILL, dims, all_tokens, q, padded, poisoned)
    twin = _launch(Scope.PREFILL, dims, live, q, inputs, clean)
    triton_attention.run_prefill(ours, SMALL)
    reference.prefill_attention(twin)
    torch.testing.assert_close(ours.writes[0][5 : inputs.num_tokens], twin.writes[0])
    assert ours.writes[0][:5].isnan().all()
    assert ours.writes[0][inputs.num_tokens :].isnan().all()


def test_many_short_prompts_find_their_requests() -> None:
    """More requests than one step of the device's search looks at."""
    lengths = np.random.default_rng(0).integers(1, 4, 140)
    batch = batch_of([(0, int(length)) for length in lengths], 0, 10, seed=1)
    inputs = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=140, device=CPU).build(batch)
    dims = _dims(1, 16, None)
    clean, poisoned = _caches(inputs, dims)
    tokens, q = TokenRange(start=0, stop=inputs.num_tokens), torch.randn(inputs.num_tokens, dims.q_width)
    ours = _launch(Scope.PREFILL, dims, tokens, q, inputs, poisoned)
    twin = _launch(Scope.PREFILL, dims, tokens, q, inputs, clean)
    triton_attention.run_prefill(ours, SMALL)
    reference.prefill_attention(twin)
    torch.testing.assert_close(ours.writes[0], twin.writes[0])


def test_kernels_choose_their_own_cut() -> None:
    inputs, dims = _inputs(), _dims(4, 64, 20)
    clean, poisoned = _caches(inputs, dims)
    q = torch.randn(inputs.num_tokens, dims.q_width)
    for scope, tokens in (
        (Scope.DECODE, TokenRange(start=0, stop=len(DECODES))),
        (Scope.PREFILL, TokenRange(start=len(DECODES), stop=inputs.num_tokens)),
    ):
        ours = _launch(scope, dims, tokens, q, inputs, poisoned)
        twin = _launch(scope, dims, tokens, q, inputs, clean)
        kernels = {Scope.DECODE: triton_attention.decode_attention, Scope.PREFILL: triton_attention.prefill_attention}
        twins = {Scope.DECODE: reference.decode_attention, Scope.PREFILL: reference.prefill_attention}
        kernels[scope](ours)
        twins[scope](twin)
        torch.testing.assert_close(ours.writes[0], twin.writes[0])


@pytest.mark.parametrize("head_dim", [20, 264])
def test_head_sizes_that_are_not_aligned_or_too_large_are_refused(head_dim: int) -> None:
    inputs, dims = _inputs(), _dims(1, head_dim, None)
    clean, _ = _caches(inputs, dims)
    launch = _launch(Scope.DECODE, dims, TokenRange(start=0, stop=2), torch.randn(5, dims.q_width), inputs, clean)
    with pytest.raises(ValueError, match=f"head size {head_dim} is no multiple of 8 from 16 to 256"):
        triton_attention.decode_attention(launch)


@pytest.mark.parametrize(
    ("num_rows", "max_context", "expected"),
    [(340, 4096, 1), (128, 4096, 2), (1, 4096, 16), (1, 131072, 64), (4, 100, 1)],
)
def test_num_splits_fills_an_h200_and_no_more(num_rows: int, max_context: int, expected: int) -> None:
    dims = AttentionDims(num_heads=32, num_kv_heads=8, head_dim=128, scale=1.0, window=None)
    assert triton_attention.num_splits(num_rows, dims, max_context, num_sms=132) == expected


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("limit_bytes", [99 << 10, 163 << 10, 227 << 10])
def test_tiles_fit_every_card(head_dim: int, limit_bytes: int) -> None:
    for candidates in (triton_attention.DECODE_TILES, triton_attention.PREFILL_TILES):
        for itemsize in (2, 4):
            tiles = triton_attention.choose_tiles(candidates, head_dim, itemsize, limit_bytes)
            assert tiles.shared_memory_bytes(head_dim, itemsize) <= limit_bytes
