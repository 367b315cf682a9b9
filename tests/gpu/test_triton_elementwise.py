"""Row-wise Triton kernels on the device against their reference twins, at the sizes of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanoflow.graph.operation import AttentionDims
from nanoflow.kernels import reference
from nanoflow.kernels.launch import LayerCache
from tests.elementwise_cases import VOCAB_SIZE, Cases, assert_twins

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.kernels import triton_elementwise as fast

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
HEADS = {
    "llama-3-8b": (32, 8, 128),
    "llama-3.2-1b": (32, 8, 64),
    "qwen2.5-7b": (28, 4, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "llama-2-7b": (32, 32, 128),
    "phi-4-mini": (24, 8, 128),
    "odd": (6, 2, 80),
}


def _cases(dtype: torch.dtype, num_tokens: int = 517, start: int = 0) -> Cases:
    return Cases(num_tokens=num_tokens, dtype=dtype, device=torch.device("cuda"), start=start)


def _dims(model: str, *, has_norm: bool, rotary_dim: int | None = None) -> AttentionDims:
    num_heads, num_kv_heads, head_dim = HEADS[model]
    return AttentionDims(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=1.0,
        window=None,
        norm_eps=1e-6 if has_norm else None,
        rotary_dim=rotary_dim,
    )


@DTYPES
@pytest.mark.parametrize("width", [896, 2048, 3584, 4096, 5120, 8192])
@pytest.mark.parametrize("num_tokens", [1, 517])
def test_rms_norm(dtype: torch.dtype, width: int, num_tokens: int) -> None:
    assert_twins(fast.rms_norm, reference.rms_norm, _cases(dtype, num_tokens).rms_norm(width))


@DTYPES
@pytest.mark.parametrize("width", [4864, 11008, 14336])
@pytest.mark.parametrize("num_tokens", [1, 517])
def test_swiglu(dtype: torch.dtype, width: int, num_tokens: int) -> None:
    assert_twins(fast.swiglu, reference.swiglu, _cases(dtype, num_tokens).swiglu(width))


@DTYPES
@pytest.mark.parametrize("width", [640, 1152, 6912])
def test_what_gemma_adds(dtype: torch.dtype, width: int) -> None:
    cases = _cases(dtype)
    assert_twins(fast.rms_norm_add, reference.rms_norm_add, cases.rms_norm_add(width))
    assert_twins(fast.rms_norm, reference.rms_norm, cases.with_exact_weights(cases.rms_norm(width)))
    assert_twins(fast.geglu, reference.geglu, cases.geglu(width))
    assert_twins(fast.embed, reference.embed, cases.scaled_embed(width))


@DTYPES
@pytest.mark.parametrize("width", [896, 4096, 8192])
@pytest.mark.parametrize("start", [0, 3])
def test_gathers(dtype: torch.dtype, width: int, start: int) -> None:
    cases = _cases(dtype, start=start)
    assert_twins(fast.embed, reference.embed, cases.embed(width))
    assert_twins(fast.gather_rows, reference.gather_rows, cases.gather_rows(width))


@DTYPES
@pytest.mark.parametrize("model", list(HEADS))
@pytest.mark.parametrize("has_norm", [False, True])
def test_rope_append(dtype: torch.dtype, model: str, has_norm: bool) -> None:
    for start in (0, 3):
        launch = _cases(dtype, start=start).rope_append(_dims(model, has_norm=has_norm), page_size=16)
        assert_twins(fast.rope_append, reference.rope_append, launch)


@DTYPES
def test_norms_of_heads_with_weights_in_float32(dtype: torch.dtype) -> None:
    cases = _cases(dtype)
    launch = cases.with_exact_weights(cases.rope_append(_dims("llama-3-8b", has_norm=True), page_size=4))
    assert_twins(fast.rope_append, reference.rope_append, launch)


@DTYPES
@pytest.mark.parametrize(("model", "rotary_dim"), [("phi-4-mini", 96), ("llama-3.2-1b", 2), ("odd", 78)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_heads_that_are_rotated_in_part(dtype: torch.dtype, model: str, rotary_dim: int, has_norm: bool) -> None:
    dims = _dims(model, has_norm=has_norm, rotary_dim=rotary_dim)
    for start in (0, 3):
        launch = _cases(dtype, start=start).rope_append(dims, page_size=16)
        assert_twins(fast.rope_append, reference.rope_append, launch)


def test_a_captured_graph_serves_another_batch_with_padding() -> None:
    """Slots, tokens and activations change between replays; the last tokens of the second batch are padding."""
    cases, dims = _cases(torch.bfloat16), _dims("llama-3-8b", has_norm=True)
    rope, embed = cases.rope_append(dims, page_size=16), cases.embed(4096)
    assert rope.cache is not None
    fast.rope_append(rope)
    fast.embed(embed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast.rope_append(rope)
        fast.embed(embed)
    other = replace(cases, seed=1)
    wanted, wanted_embed = other.rope_append(dims, page_size=16), other.embed(4096)
    num_live, num_slots = 400, rope.cache.keys.shape[0] * 16
    rope.reads[0].copy_(wanted.reads[0])
    for ours, theirs in zip((*rope.weights, *embed.weights), (*wanted.weights, *wanted_embed.weights), strict=True):
        ours.copy_(theirs)
    assert rope.rotation is not None and wanted.rotation is not None
    rope.rotation.cos.copy_(wanted.rotation.cos)
    rope.rotation.sin.copy_(wanted.rotation.sin)
    rope.pages.slots.copy_(wanted.pages.slots)
    rope.pages.slots[num_live:] = num_slots
    embed.inputs.token_ids.copy_(wanted_embed.inputs.token_ids)
    embed.inputs.token_ids[num_live:] = VOCAB_SIZE
    for tensor in (rope.cache.keys, rope.cache.values, *embed.writes):
        tensor.fill_(torch.nan)
    graph.replay()
    live = replace(wanted, reads=(wanted.reads[0][:num_live],), writes=(torch.empty_like(rope.writes[0][:num_live]),))
    live = replace(live, tokens=replace(live.tokens, stop=num_live))
    reference.rope_append(live)
    reference.embed(wanted_embed)
    assert live.cache is not None
    _assert_mostly_equal(rope.cache, live.cache)
    assert torch.equal(embed.writes[0][:num_live], wanted_embed.writes[0][:num_live])
    assert not embed.writes[0][num_live:].any()


def _assert_mostly_equal(ours: LayerCache, expected: LayerCache) -> None:
    for mine, wanted in ((ours.keys, expected.keys), (ours.values, expected.values)):
        torch.testing.assert_close(mine, wanted, rtol=2.0**-6, atol=2.0**-6, equal_nan=True)
        assert torch.equal(mine.isnan(), wanted.isnan())
