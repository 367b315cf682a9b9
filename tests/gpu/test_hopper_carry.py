"""Products that carry decode attention, on a Hopper card, against the same numbers in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon")

from nanoflow.graph.operation import OpKind
from nanoflow.kernels.hopper import can_carry
from nanoflow.kernels.hopper.carry import HopperCarrier
from nanoflow.kernels.launch import SHARES, HostLengths
from tests.attention_cases import assert_decoded, carrier_case, decode_case, dims_of, with_contexts
from tests.fp8_cases import assert_gated, assert_product, carried_case
from tests.gemm_cases import (
    assert_linear,
    assert_linear_swiglu,
    assert_surroundings_untouched,
    exact_linear,
    linear_case,
)

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", torch.cuda.current_device())
NUM_SMS = torch.cuda.get_device_properties(GPU).multi_processor_count
if not can_carry(GPU, torch.bfloat16, dims_of((32, 8, 128), None)):
    pytest.skip("needs a Hopper card", allow_module_level=True)


def skewed(num: int) -> list[int]:
    return [0 if row % 5 == 4 else 1 + int(9000 / (1 + row) ** 1.2) for row in range(num)]


@pytest.mark.parametrize("num_tokens", [1, 300, 1000])
@pytest.mark.parametrize("kind", ["linear", "bias", "add", "swiglu"])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_products_and_attention(kind: str, num_tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that no tile divides; two products carry, and something is left."""
    shape = (2 * 1904, 1040)
    carried = decode_case(skewed(61), (32, 8, 128), GPU, monkeypatch)
    carrier = HopperCarrier(num_sms=NUM_SMS, steps=steps)
    taken = carrier.take(carried, 3)
    for until in (100, 200):
        launch, expected = carrier_case(kind, num_tokens, shape, GPU)
        carrier.run(launch, taken, until)
        (assert_linear_swiglu if kind == "swiglu" else assert_linear)(launch.writes[0], expected)
        if kind == "add":
            assert_surroundings_untouched(launch.writes[0])
    carrier.finish(taken)
    assert_decoded(carried)


@pytest.mark.parametrize("num_tokens", [300, 1000])
@pytest.mark.parametrize(("kind", "steps"), [("linear", 2), ("bias", 3), ("add", 2), ("swiglu", 4)])
def test_products_in_fp8_and_attention(kind: str, num_tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, in narrow tiles and in wide ones. Sums are exact up to the error of fast sums in FP8."""
    carried = decode_case(skewed(61), (32, 8, 128), GPU, monkeypatch)
    carrier = HopperCarrier(num_sms=NUM_SMS, steps=steps)
    taken = carrier.take(carried, 3)
    for until in (100, 200):
        launch, expected = carried_case(kind, num_tokens, (2 * 1904, 1040), GPU)
        carrier.run(launch, taken, until)
        if kind == "swiglu":
            assert_gated(launch.writes[0], expected)
        else:
            assert_product(launch.writes[0], expected, has_fast_sums=True)
    carrier.finish(taken)
    assert_decoded(carried)


@pytest.mark.parametrize("heads", [(32, 8, 128), (32, 4, 64), (4, 4, 128), (28, 4, 128)])
@pytest.mark.parametrize("shares", [(SHARES,), (1, 2, 255), (), (0, 128, 128, SHARES)])
def test_any_heads_and_shares(
    heads: tuple[int, int, int], shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = decode_case(skewed(61), heads, GPU, monkeypatch)
    carrier = HopperCarrier(num_sms=NUM_SMS, steps=4)
    taken = carrier.take(carried, len(shares) + 1)
    for until in shares:
        launch = linear_case(300, (4096, 512), torch.bfloat16, GPU)
        expected = exact_linear(launch)
        carrier.run(launch, taken, until)
        assert_linear(launch.writes[0], expected)
    carrier.finish(taken)
    assert_decoded(carried)


def test_later_keys_may_be_far_more_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that grow by hundreds from block to block, and fall again."""
    carried = decode_case([1000] * 8, (32, 8, 128), GPU, monkeypatch)
    assert carried.cache is not None
    for row in range(8):
        for page in range(63):
            at = int(carried.inputs.pages[0].decode_tables[row, page])
            carried.cache.keys[at] *= 0.1 + 8.0 * (page % 31) / 31
    carrier = HopperCarrier(num_sms=NUM_SMS, steps=4)
    taken = carrier.take(carried, 2)
    carrier.run(linear_case(1024, (4096, 4096), torch.bfloat16, GPU), taken, 200)
    carrier.finish(taken)
    assert_decoded(carried)


def test_one_cuda_graph_serves_other_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    longest, num = 2000, 100
    carried = decode_case([longest] * num, (32, 8, 128), GPU, monkeypatch)
    products = [linear_case(512, (4096, 4096), torch.bfloat16, GPU) for _ in range(2)]
    expected = [exact_linear(product) for product in products]

    def run() -> None:
        carrier = HopperCarrier(num_sms=NUM_SMS, steps=4)
        taken = carrier.take(carried, 3)
        for product, until in zip(products, (128, SHARES), strict=True):
            carrier.run(product, taken, until)
        carrier.finish(taken)

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
        assert_decoded(dataclasses.replace(carried, inputs=dataclasses.replace(carried.inputs, host=host)))
        for product, exact in zip(products, expected, strict=True):
            assert_linear(product.writes[0], exact)


def test_shares_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = decode_case([64] * 4, (32, 8, 128), GPU, monkeypatch)
    carrier = HopperCarrier(num_sms=NUM_SMS, steps=4)
    taken = carrier.take(carried, 3)
    product = linear_case(128, (4096, 512), torch.bfloat16, GPU)
    assert product.op.kind is OpKind.LINEAR
    carrier.run(product, taken, 100)
    for until in (99, SHARES + 1):
        with pytest.raises(ValueError, match=f"a share of attention from 100 to {until}"):
            carrier.run(product, taken, until)
