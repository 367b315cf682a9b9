"""Row-wise Triton kernels against their reference twins, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.graph.operation import AttentionDims
from nanoflow.kernels import reference
from nanoflow.kernels import triton_elementwise as fast
from nanoflow.kernels.launch import Kernel, Launch, Rotation
from tests.elementwise_cases import VOCAB_SIZE, Cases, assert_twins, results_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
WIDTHS = pytest.mark.parametrize("width", [8, 96, 2304])


def _cases(dtype: torch.dtype = torch.float32, start: int = 0) -> Cases:
    return Cases(num_tokens=5, dtype=dtype, device=CPU, start=start)


def _assert_twins(ours: Kernel, expected: Kernel, launch: Launch) -> None:
    # The interpreter converts float32 to bfloat16 by cutting it off; a GPU rounds. float16 it rounds.
    assert_twins(ours, expected, launch, truncates=launch.writes[0].dtype == torch.bfloat16)


def _dims(
    num_heads: int, num_kv_heads: int, head_dim: int, *, rotary_dim: int | None = None, has_norm: bool = False
) -> AttentionDims:
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
@WIDTHS
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    _assert_twins(fast.rms_norm, reference.rms_norm, _cases(dtype).rms_norm(width))


@DTYPES
@WIDTHS
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    _assert_twins(fast.swiglu, reference.swiglu, _cases(dtype).swiglu(width))


@DTYPES
@WIDTHS
def test_what_gemma_adds(dtype: torch.dtype, width: int) -> None:
    cases = _cases(dtype)
    _assert_twins(fast.rms_norm_add, reference.rms_norm_add, cases.rms_norm_add(width))
    _assert_twins(fast.rms_norm, reference.rms_norm, cases.with_exact_weights(cases.rms_norm(width)))
    _assert_twins(fast.geglu, reference.geglu, cases.geglu(width))
    _assert_twins(fast.embed, reference.embed, cases.scaled_embed(width))


@DTYPES
@WIDTHS
@pytest.mark.parametrize("start", [0, 3])
def test_gathers(dtype: torch.dtype, width: int, start: int) -> None:
    cases = _cases(dtype, start)
    _assert_twins(fast.embed, reference.embed, cases.embed(width))
    _assert_twins(fast.gather_rows, reference.gather_rows, cases.gather_rows(width))


# The last one needs two programs a token, with the border between them among the query heads.
@DTYPES
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("sizes", [(4, 2, 8), (3, 1, 24), (2, 2, 64), (14, 2, 128)])
def test_rope_append(dtype: torch.dtype, has_norm: bool, sizes: tuple[int, int, int]) -> None:
    dims = _dims(*sizes, has_norm=has_norm)
    for start in (0, 3):
        _assert_twins(fast.rope_append, reference.rope_append, _cases(dtype, start).rope_append(dims, page_size=4))


@DTYPES
def test_norms_of_heads_with_weights_in_float32(dtype: torch.dtype) -> None:
    cases = _cases(dtype)
    launch = cases.with_exact_weights(cases.rope_append(_dims(4, 2, 8, has_norm=True), page_size=4))
    _assert_twins(fast.rope_append, reference.rope_append, launch)


# One pair, most of a head, all but a pair; the last sizes need two programs a token.
@DTYPES
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("sizes", [(4, 2, 8, 2), (3, 1, 24, 18), (2, 2, 64, 62), (14, 2, 128, 96)])
def test_heads_that_are_rotated_in_part(dtype: torch.dtype, has_norm: bool, sizes: tuple[int, int, int, int]) -> None:
    *heads, rotary_dim = sizes
    dims = _dims(*heads, rotary_dim=rotary_dim, has_norm=has_norm)
    for start in (0, 3):
        launch = _cases(dtype, start).rope_append(dims, page_size=4)
        _assert_twins(fast.rope_append, reference.rope_append, launch)


@pytest.mark.parametrize("kernel", [fast.rope_append, reference.rope_append])
def test_what_is_not_rotated_passes_as_it_is(kernel: Kernel) -> None:
    """Also beside numbers that are not finite, of which every product is one."""
    dims = _dims(4, 2, 16, rotary_dim=10)
    launch = _cases().rope_append(dims, page_size=4)
    heads = launch.reads[0].view(5, -1, 16)
    heads[2, :, 3], heads[3, :, 12] = torch.inf, torch.nan
    q, keys, values = results_of(kernel, launch)
    slots = launch.pages.slots.long()
    pages, offsets = slots // 4, slots % 4
    whole = torch.cat((q.view(5, 4, 16), keys[pages, :, offsets]), dim=1)
    torch.testing.assert_close(whole[..., 10:], heads[:, :6, 10:], rtol=0.0, atol=0.0, equal_nan=True)
    torch.testing.assert_close(values[pages, :, offsets], heads[:, 6:], rtol=0.0, atol=0.0, equal_nan=True)
    is_moved = (whole[..., :10] - heads[:, :6, :10]).abs() > 1e-3
    assert is_moved[[0, 1, 4]].any(0).all()


def test_a_slot_outside_the_cache_is_not_written() -> None:
    launch = _cases().rope_append(_dims(4, 2, 8), page_size=4)
    _, keys, values = results_of(reference.rope_append, launch)
    assert launch.cache is not None
    num_slots = launch.cache.keys.shape[0] * 4
    padded_slots = torch.cat((launch.pages.slots, torch.tensor([num_slots, num_slots + 1, -1])))
    padded = Cases(num_tokens=8, dtype=torch.float32, device=CPU).rope_append(_dims(4, 2, 8), page_size=4)
    padded.reads[0][:5] = launch.reads[0]
    assert launch.rotation is not None
    inputs = replace(padded.inputs, pages=(replace(padded.pages, slots=padded_slots),))
    rotation = Rotation(
        cos=torch.cat((launch.rotation.cos, torch.ones(3, 4))), sin=torch.cat((launch.rotation.sin, torch.zeros(3, 4)))
    )
    padded = replace(padded, inputs=inputs, rotation=rotation, cache=launch.cache)
    q, ours_keys, ours_values = results_of(fast.rope_append, padded)
    torch.testing.assert_close(ours_keys, keys, equal_nan=True)
    torch.testing.assert_close(ours_values, values, equal_nan=True)
    torch.testing.assert_close(q[5:], padded.reads[0][5:, :32])


def test_an_index_outside_its_tensor_reads_zeros() -> None:
    embed, gather = _cases().embed(8), _cases().gather_rows(8)
    ids = torch.tensor([VOCAB_SIZE, -1, 3, 1 << 40, 0])
    (embedded,) = results_of(fast.embed, replace(embed, inputs=replace(embed.inputs, token_ids=ids)))
    (gathered,) = results_of(fast.gather_rows, replace(gather, inputs=replace(gather.inputs, logit_tokens=ids)))
    for ours, source in ((embedded, embed.weights[0]), (gathered, gather.reads[0])):
        assert torch.equal(ours[[2, 4]], source[[3, 0]])
        assert not ours[[0, 1, 3]].any()


def test_a_row_of_nan_stays_alone() -> None:
    norm, swiglu = _cases().rms_norm(96), _cases().swiglu(96)
    for launch in (norm, swiglu):
        launch.reads[0][2] = torch.nan
    for kernel, launch in ((fast.rms_norm, norm), (fast.swiglu, swiglu)):
        assert results_of(kernel, launch)[-1].isnan().any(-1).tolist() == [False, False, True, False, False]
