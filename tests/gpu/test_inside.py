"""Products with decode attention inside, on a Hopper card, against the same numbers in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import OpKind, Scope
from nanoflow.kernels import gluon_inside
from nanoflow.kernels.launch import SHARES, HostLengths, Launch, LayerCache
from tests.gemm_cases import (
    assert_linear,
    assert_linear_swiglu,
    assert_surroundings_untouched,
    exact_linear,
    exact_linear_swiglu,
    linear_add_case,
    linear_case,
    linear_swiglu_case,
)
from tests.gpu.test_triton_attention import _assert_close, _cache, _dims, _exact, _inputs, _launch, with_contexts

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", torch.cuda.current_device())
NUM_SMS = torch.cuda.get_device_properties(GPU).multi_processor_count
if not gluon_inside.can_carry(GPU, torch.bfloat16, _dims((32, 8, 128), None)):
    pytest.skip("needs a Hopper card", allow_module_level=True)


def attention(contexts: list[int], heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Rows with these contexts, 0 for one that is no decode; NaN behind each."""
    inputs, dims = (
        _inputs([(max(context - 1, 0), 1) for context in contexts], len(contexts), monkeypatch),
        _dims(heads, None),
    )
    cache = _cache(inputs, dims)
    for row, context in enumerate(contexts):
        if context % 16:
            page = int(inputs.decodes.page_tables[row, context // 16])
            cache.keys[page, :, context % 16 :] = cache.values[page, :, context % 16 :] = torch.nan
    inputs = dataclasses.replace(
        inputs,
        decodes=with_contexts(inputs.decodes, torch.tensor(contexts, dtype=torch.int32, device=GPU)),
        host=HostLengths(decode_context_len=contexts, prefill_query_start=[len(contexts)], prefill_context_len=[]),
    )
    tokens = TokenRange(start=0, stop=len(contexts))
    q = torch.randn(len(contexts), dims.q_width, device=GPU).bfloat16()
    return _launch(Scope.DECODE, dims, tokens, q, inputs, cache)


def check_attention(launch: Launch) -> None:
    assert launch.cache is not None
    clean = LayerCache(keys=launch.cache.keys.nan_to_num(), values=launch.cache.values.nan_to_num())
    exact = _exact(dataclasses.replace(launch, cache=clean))
    is_decode = launch.inputs.decodes.context_len > 0
    _assert_close(launch.writes[0][is_decode], exact[is_decode])
    assert launch.writes[0][~is_decode].isnan().all()


def skewed(num: int) -> list[int]:
    return [0 if row % 5 == 4 else 1 + int(9000 / (1 + row) ** 1.2) for row in range(num)]


@pytest.mark.parametrize("num_tokens", [1, 300, 1000])
@pytest.mark.parametrize("kind", ["linear", "bias", "add", "swiglu"])
@pytest.mark.parametrize("steps", [2, 4])
def test_products_and_attention(kind: str, num_tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that no tile divides; two products carry, and something is left."""
    shape, dtype = (2 * 1904, 1040), torch.bfloat16
    carried = attention(skewed(61), (32, 8, 128), monkeypatch)
    taken = gluon_inside.take(carried, 3, NUM_SMS, steps)
    for until in (100, 200):
        if kind == "swiglu":
            launch = linear_swiglu_case(num_tokens, shape, dtype, GPU)
            expected = exact_linear_swiglu(launch)
        elif kind == "add":
            launch, expected = linear_add_case(num_tokens, shape, dtype, GPU)
        else:
            launch = linear_case(num_tokens, shape, dtype, GPU, has_bias=kind == "bias")
            expected = exact_linear(launch)
        kind_of = {"swiglu": OpKind.LINEAR_SWIGLU, "add": OpKind.LINEAR_ADD}.get(kind, OpKind.LINEAR)
        launch = dataclasses.replace(launch, op=dataclasses.replace(launch.op, kind=kind_of))
        gluon_inside.carry(launch, taken, until, NUM_SMS)
        (assert_linear_swiglu if kind == "swiglu" else assert_linear)(launch.writes[0], expected)
        if kind == "add":
            assert_surroundings_untouched(launch.writes[0])
    gluon_inside.finish(taken, NUM_SMS)
    check_attention(carried)


@pytest.mark.parametrize("heads", [(32, 8, 128), (32, 4, 64), (4, 4, 128), (28, 4, 128)])
@pytest.mark.parametrize("shares", [(SHARES,), (1, 2, 255), (), (0, 128, 128, SHARES)])
def test_any_heads_and_shares(
    heads: tuple[int, int, int], shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = attention(skewed(61), heads, monkeypatch)
    taken = gluon_inside.take(carried, len(shares) + 1, NUM_SMS, 4)
    for until in shares:
        launch = linear_case(300, (4096, 512), torch.bfloat16, GPU)
        expected = exact_linear(launch)
        gluon_inside.carry(launch, taken, until, NUM_SMS)
        assert_linear(launch.writes[0], expected)
    gluon_inside.finish(taken, NUM_SMS)
    check_attention(carried)


def test_later_keys_may_be_far_more_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that grow by hundreds from block to block, and fall again."""
    carried = attention([1000] * 8, (32, 8, 128), monkeypatch)
    assert carried.cache is not None
    for row in range(8):
        for page in range(63):
            at = int(carried.inputs.decodes.page_tables[row, page])
            carried.cache.keys[at] *= 0.1 + 8.0 * (page % 31) / 31
    taken = gluon_inside.take(carried, 2, NUM_SMS, 4)
    gluon_inside.carry(linear_case(1024, (4096, 4096), torch.bfloat16, GPU), taken, 200, NUM_SMS)
    gluon_inside.finish(taken, NUM_SMS)
    check_attention(carried)


def test_one_cuda_graph_serves_other_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    longest, num = 2000, 100
    carried = attention([longest] * num, (32, 8, 128), monkeypatch)
    products = [linear_case(512, (4096, 4096), torch.bfloat16, GPU) for _ in range(2)]
    expected = [exact_linear(product) for product in products]

    def run() -> None:
        taken = gluon_inside.take(carried, 3, NUM_SMS, 4)
        for product, until in zip(products, (128, SHARES), strict=True):
            gluon_inside.carry(product, taken, until, NUM_SMS)
        gluon_inside.finish(taken, NUM_SMS)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    decodes = carried.inputs.decodes
    for seed in range(3):
        contexts = torch.randint(0, longest + 1, (num,), generator=torch.Generator().manual_seed(seed)).int()
        contexts[seed::3] = 0
        changed = with_contexts(decodes, contexts.to(GPU))
        decodes.context_len.copy_(changed.context_len)
        decodes.key_blocks.copy_(changed.key_blocks)
        for tensor in (carried.writes[0], *(product.writes[0] for product in products)):
            tensor.fill_(torch.nan)
        graph.replay()
        host = HostLengths(decode_context_len=contexts.tolist(), prefill_query_start=[num], prefill_context_len=[])
        check_attention(dataclasses.replace(carried, inputs=dataclasses.replace(carried.inputs, host=host)))
        for product, exact in zip(products, expected, strict=True):
            assert_linear(product.writes[0], exact)


def test_shares_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = attention([64] * 4, (32, 8, 128), monkeypatch)
    taken = gluon_inside.take(carried, 3, NUM_SMS, 4)
    product = linear_case(128, (4096, 512), torch.bfloat16, GPU)
    assert product.op.kind is OpKind.LINEAR
    gluon_inside.carry(product, taken, 100, NUM_SMS)
    for until in (99, SHARES + 1):
        with pytest.raises(ValueError, match=f"a share of attention from 100 to {until}"):
            gluon_inside.carry(product, taken, until, NUM_SMS)
