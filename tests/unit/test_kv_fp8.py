"""Keys and values in 8 bits: rounding, the kernels that write and read them, and a key that has to be found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, KvType, OpKind, Scope
from nanoflow.kernels import reference, triton_attention, triton_elementwise
from nanoflow.kernels.kv_fp8 import FP8, SCALE, dequantised, quantised
from nanoflow.kernels.launch import Launch, LayerCache
from nanoflow.kernels.triton_attention import Tiles
from tests.attention_cases import cache_of, dims_of, exact, inputs_of, launch_of
from tests.compiling import compiled
from tests.elementwise_cases import Cases, results_of
from tests.kv_fp8_cases import NEEDLE_BOUND, Needle, in_8_bits, in_16_bits, needle_case, poison_8_bits, with_sinks

CPU = torch.device("cpu")
WIDE = Tiles(block_m=16, block_n=2048, num_warps=4, num_stages=2)
REFERENCES = {
    OpKind.DECODE_ATTENTION: reference.decode_attention,
    OpKind.PREFILL_ATTENTION: reference.prefill_attention,
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# The interpreter cuts bfloat16 off instead of rounding.
FINE_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
SCOPES = pytest.mark.parametrize("scope", [Scope.DECODE, Scope.PREFILL], ids=str)
# The logarithm of an empty part's sum is -inf on purpose; NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")


@DTYPES
def test_an_element_keeps_four_digits_and_the_largest_almost_all(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 4 if dtype == torch.float16 else 30, 64)[:, None]
    vectors = (torch.randn(64, 128) * sizes).to(dtype)
    numbers, scales = quantised(vectors)
    assert (numbers.dtype, scales.dtype, scales.shape) == (FP8, SCALE, (64,))
    assert (numbers.float().abs().amax(-1) == 448).all()
    given, plain = vectors.float(), numbers.float() * scales.float()[:, None]
    assert torch.equal(dequantised(numbers, scales, torch.float32), plain)
    assert torch.equal(dequantised(numbers, scales, dtype), plain.to(dtype))
    error = (dequantised(numbers, scales, torch.float32) - given).abs()
    assert (error <= torch.maximum(given.abs() / 16, 2.0**-10 * scales.float()[:, None])).all()
    assert (error.gather(1, given.abs().argmax(-1, keepdim=True)) <= given.abs().amax(-1, keepdim=True) / 120).all()


def test_borders_of_a_scale() -> None:
    """A scale is rounded up, so that no number is beyond the largest; zeros stay zeros."""
    largest = torch.tensor([[448.0], [449.0], [450.0], [0.0], [1e-30], [3e38]])
    numbers, scales = quantised(largest)
    assert scales.tolist()[:3] == [1.0, 1.0078125, 1.0078125] and scales[3] > 0
    assert numbers.float().flatten().tolist() == [448.0, 448.0, 448.0, 0.0, 448.0, 448.0]
    torch.testing.assert_close(dequantised(numbers, scales, torch.float32), largest, rtol=2.0**-7, atol=0.0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    vector = torch.ones(2, 8)
    vector[1, 3] = bad
    back = dequantised(*quantised(vector), torch.float32)
    assert back[0].isfinite().all() and not back[1].isfinite().any()


@FINE_DTYPES
@pytest.mark.parametrize(
    ("heads", "rotary_dim", "has_norm"), [((4, 2, 16), None, False), ((3, 1, 24), 8, True), ((8, 8, 64), None, True)]
)
def test_what_is_written(
    dtype: torch.dtype, heads: tuple[int, int, int], rotary_dim: int | None, has_norm: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    dims = AttentionDims(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=1.0,
        norm_eps=1e-6 if has_norm else None,
        rotary_dim=rotary_dim,
        kv_type=KvType.FP8,
    )
    launch = Cases(num_tokens=5, dtype=dtype, device=CPU, start=1).rope_append(dims, page_size=4)
    assert launch.cache is not None
    cache = poison_8_bits(tuple(launch.cache.keys.shape), CPU)
    plain = results_of(reference.rope_append, launch)
    for kernel in (reference.rope_append, triton_elementwise.rope_append):
        mine = dataclasses.replace(
            cache, **{name: getattr(cache, name).clone() for name in ("keys", "values", "scales")}
        )
        kernel(dataclasses.replace(launch, cache=mine))
        back = in_16_bits(mine, torch.float32)
        for ours, given in zip((back.keys, back.values), plain[1:], strict=True):
            is_written = given.isfinite()
            assert torch.equal(ours.isfinite(), is_written)
            size = given.float().abs()
            bound = size / 15 + size.amax(-1, keepdim=True) * 2.0**-18
            assert ((ours - given.float()).abs() <= bound)[is_written].all()
        assert mine.scales is not None
        for place, given in enumerate(plain[1:]):
            is_written = given.isfinite().all(-1)
            assert torch.equal(mine.scales[..., place][is_written], quantised(given)[1][is_written])


@SCOPES
@pytest.mark.parametrize("window", [None, 20])
@DTYPES
def test_attention_computes_with_the_numbers_that_are_stored(
    scope: Scope, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference gives what it gives on the same numbers in the type of activations, Triton what is exact."""
    monkeypatch.setattr(triton_attention, "_MIN_SPLIT_TOKENS", 16)
    torch.manual_seed(0)
    requests = [(0, 1), (15, 1), (66, 1)] if scope is Scope.DECODE else [(21, 9), (0, 37)]
    inputs = inputs_of(requests, len(requests) if scope is Scope.DECODE else 0, CPU, monkeypatch)
    dims = dataclasses.replace(dims_of((4, 2, 24), window), kv_type=KvType.FP8)
    full = cache_of(inputs, dims)
    # Values of very different sizes; some are so small that their scale takes all digits of a weight in float16.
    sizes = torch.logspace(-6, 1, full.values.shape[0])[:, None, None, None]
    cache = in_8_bits(LayerCache(keys=full.keys.float(), values=full.values.float() * sizes))
    tokens = TokenRange(start=0, stop=inputs.num_tokens)
    q = torch.randn(inputs.num_tokens, dims.q_width).to(dtype)
    twin = launch_of(scope, dims, tokens, q, inputs, in_16_bits(cache, dtype))
    REFERENCES[twin.op.kind](twin)
    expected = exact(dataclasses.replace(twin, cache=in_16_bits(cache, torch.float32)))
    for splits in (1, 2) if scope is Scope.DECODE else (None,):
        fast, slow = (launch_of(scope, dims, tokens, q, inputs, cache) for _ in range(2))
        if splits is None:
            triton_attention.run_prefill(fast, dataclasses.replace(WIDE, block_n=16))
        else:
            triton_attention.run_decode(fast, dataclasses.replace(WIDE, block_n=16), splits)
        REFERENCES[slow.op.kind](slow)
        assert torch.equal(slow.writes[0], twin.writes[0])
        # Results are rounded to the type of activations, of which the smallest number of float16 is not small; the
        # interpreter cuts bfloat16 off.
        step = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        least = 2.0**-24 if dtype == torch.float16 else 0.0
        size = expected.abs().amax(-1, keepdim=True)
        assert ((fast.writes[0].float() - expected).abs() <= 1.2 * step * size + least).all()


@SCOPES
def test_sinks_beside_small_values(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink that takes most of a softmax must leave the weights of small values their digits."""
    torch.manual_seed(0)
    requests = [(0, 1), (66, 1)] if scope is Scope.DECODE else [(21, 9), (0, 37)]
    inputs = inputs_of(requests, len(requests) if scope is Scope.DECODE else 0, CPU, monkeypatch)
    dims = dataclasses.replace(dims_of((8, 2, 24), None), kv_type=KvType.FP8)
    full = cache_of(inputs, dims)
    cache = in_8_bits(LayerCache(keys=full.keys.float(), values=full.values.float() * 1e-5))
    q = torch.randn(inputs.num_tokens, dims.q_width).bfloat16()
    launch = with_sinks(launch_of(scope, dims, TokenRange(start=0, stop=len(q)), q, inputs, cache))
    expected = exact(dataclasses.replace(launch, cache=in_16_bits(cache, torch.float32)))
    if scope is Scope.DECODE:
        triton_attention.run_decode(launch, dataclasses.replace(WIDE, block_n=16), 1)
    else:
        triton_attention.run_prefill(launch, dataclasses.replace(WIDE, block_n=16))
    size = expected.view(len(q), 8, -1).abs().amax(-1, keepdim=True)
    error = (launch.writes[0].float() - expected).view(len(q), 8, -1).abs()
    # Sink 7 is so large that nothing is left of its head.
    assert (error <= 2.0**-7 * 1.2 * size + 1e-20).all()


@SCOPES
def test_a_key_is_found_among_thousands(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    case = needle_case(scope, 4, 8229, torch.bfloat16, CPU, monkeypatch)
    REFERENCES[case.launch.op.kind](case.launch)
    _assert_found(case)


@SCOPES
def test_a_key_is_found_among_thousands_by_triton(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    case = needle_case(scope, 2, 8229, torch.float32, CPU, monkeypatch)
    if scope is Scope.DECODE:
        triton_attention.run_decode(case.launch, WIDE, 2)
    else:
        triton_attention.run_prefill(case.launch, WIDE)
    _assert_found(case)


def _assert_found(case: Needle) -> None:
    out = case.launch.writes[0]
    assert case.num_found(out) == len(case.places)
    assert case.error(out) < NEEDLE_BOUND


@pytest.mark.parametrize("fault", ["scales of 1", "keys twice as large", "one value's scale", "sums in 8 bits"])
def test_the_bound_finds_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would say of a kernel or cache with a fault."""
    case = needle_case(Scope.DECODE, 4, 8229, torch.float32, CPU, monkeypatch)
    cache = case.launch.cache
    assert cache is not None and cache.scales is not None
    scales = cache.scales
    if fault == "scales of 1":
        full = in_16_bits(cache, torch.float32)
        ones = torch.ones_like(scales)
        cache = LayerCache(keys=full.keys.to(FP8), values=(full.values * 1.0001).to(FP8), scales=ones)
    elif fault == "keys twice as large":
        scales[::2, ..., 0] *= 2
    elif fault == "one value's scale":
        page, offset = divmod(int(case.places[3]), 16)
        scales[case.launch.pages.decode_tables[3, page], :, offset, 1] *= 2
    else:
        cache = in_16_bits(cache, torch.float32)
    launch = dataclasses.replace(case.launch, cache=cache)
    if fault == "sums in 8 bits":
        out = _with_sums_in_8_bits(launch)
    else:
        reference.decode_attention(launch)
        out = launch.writes[0]
    assert case.error(out) > 1.2 * NEEDLE_BOUND


def _with_sums_in_8_bits(launch: Launch) -> torch.Tensor:
    """Attention as tensor cores would compute it in 8 bits: weights in e4m3, and sums of few digits."""
    assert launch.cache is not None
    q, table = launch.reads[0].view(len(launch.reads[0]), 2, -1)[:, 0], launch.pages.decode_tables[0].long()
    num_keys = int(launch.inputs.decodes.context_len[0])
    keys, values = (part[table].flatten(0, 2)[:num_keys] for part in (launch.cache.keys, launch.cache.values))
    scores = q @ keys.T * q.shape[1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = torch.zeros(len(q), values.shape[1])
    for begin in range(0, num_keys, 32):
        some = slice(begin, begin + 32)
        total = (total + weights[:, some].to(FP8).float() @ values[some]).bfloat16().float()
    return (total / weights.sum(-1, keepdim=True)).repeat(1, 2)


def test_on_hopper_products_are_of_16_bits_and_sum_in_32() -> None:
    (reports,) = compiled("tests.compile_kv_fp8")
    assert reports["decode"]["products"]
    for report in reports.values():
        assert not report["num_spills"] and all(".f32.f16.f16" in product for product in report["products"])
