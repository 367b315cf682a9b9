"""Attention with sinks: reference kernels against its formula, Triton's programs against the reference kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, Operation, OpKind, Resource, Scope
from nanoflow.kernels import hopper, reference, triton_attention
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.hopper import attention as hopper_attention
from nanoflow.kernels.launch import BatchInputs, Launch, LayerCache
from nanoflow.kernels.triton_attention import Tiles
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from tests.compiling import compiled
from tests.graphs import PAGE_SIZE, batch_of

# The logarithm of an empty part's sum is -inf on purpose; NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")
CPU = torch.device("cpu")
DECODES = [(0, 1), (15, 1), (50, 1)]
CHUNKS = [(0, 19), (21, 9), (3, 1)]
SMALL = Tiles(block_m=16, block_n=16, num_warps=4, num_stages=2)
# Sinks that take nearly all of a softmax, about as much as a key, and hardly anything; then two that differ.
SINKS = torch.tensor([9.0, 0.5, -9.0, 2.0, 3.0, -1.0])
KINDS = {Scope.DECODE: OpKind.DECODE_ATTENTION, Scope.PREFILL: OpKind.PREFILL_ATTENTION}


def _dims(window: int | None) -> AttentionDims:
    return AttentionDims(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.3, window=window, has_sinks=True)


def _inputs() -> BatchInputs:
    batch = batch_of(DECODES + CHUNKS, len(DECODES), 10, seed=3)
    return InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=len(batch.rows), device=CPU).build(batch)


def _launch(scope: Scope, dims: AttentionDims, inputs: BatchInputs) -> Launch:
    op = Operation(
        name="attention",
        kind=KINDS[scope],
        resource=Resource.MEMORY,
        scope=scope,
        reads=("q",),
        writes=("o",),
        weights=("sinks",),
        dims=dims,
    )
    start, stop = {Scope.DECODE: (0, len(DECODES)), Scope.PREFILL: (len(DECODES), inputs.num_tokens)}[scope]
    generator = torch.Generator().manual_seed(stop)
    tables = torch.cat((inputs.pages[0].decode_tables, inputs.pages[0].prefill_tables))
    shape = (int(tables.max()) + 1, dims.num_kv_heads, PAGE_SIZE, dims.head_dim)
    q = torch.randn(stop - start, dims.q_width, generator=generator)
    return Launch(
        op=op,
        layer=0,
        tokens=TokenRange(start=start, stop=stop),
        reads=(q,),
        writes=(torch.full_like(q, torch.nan),),
        weights=(SINKS,),
        inputs=inputs,
        cache=LayerCache(keys=torch.randn(shape, generator=generator), values=torch.randn(shape, generator=generator)),
    )


def _by_formula(launch: Launch, row: int, table: torch.Tensor, place: int) -> torch.Tensor:
    """The query in this row at a place of its sequence: exp(score) / (exp(sink) + the sum over keys), in float64."""
    dims, cache = launch.op.dims, launch.cache
    assert isinstance(dims, AttentionDims)
    assert cache is not None
    places = torch.arange(0 if dims.window is None else max(place - dims.window + 1, 0), place + 1)
    keys, values = (
        each[table[places // PAGE_SIZE].long(), :, places % PAGE_SIZE].double().repeat_interleave(3, dim=1)
        for each in (cache.keys, cache.values)
    )
    q = launch.reads[0][row].view(dims.num_heads, dims.head_dim).double()
    exponents = (torch.einsum("hd,khd->kh", q, keys) * dims.scale).exp()
    weights = exponents / (exponents.sum(0) + launch.weights[0].double().exp())
    return torch.einsum("kh,khd->hd", weights, values).flatten().float()


@pytest.mark.parametrize("window", [None, 1, 20])
def test_the_sink_is_one_more_term_of_the_denominator(window: int | None) -> None:
    inputs, dims = _inputs(), _dims(window)
    decode, prefill = _launch(Scope.DECODE, dims, inputs), _launch(Scope.PREFILL, dims, inputs)
    reference.decode_attention(decode)
    reference.prefill_attention(prefill)
    for row, (before, _) in enumerate(DECODES):
        expected = _by_formula(decode, row, inputs.pages[0].decode_tables[row], before)
        torch.testing.assert_close(decode.writes[0][row], expected, rtol=1e-4, atol=1e-5)
    places = [(chunk, before + new) for chunk, (before, count) in enumerate(CHUNKS) for new in range(count)]
    for row, (chunk, place) in enumerate(places):
        expected = _by_formula(prefill, row, inputs.pages[0].prefill_tables[chunk], place)
        torch.testing.assert_close(prefill.writes[0][row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("splits", [1, 4])
def test_parts_of_a_context_have_the_sink_once(
    window: int | None, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "_MIN_SPLIT_TOKENS", 16)
    inputs, dims = _inputs(), _dims(window)
    ours, twin = _launch(Scope.DECODE, dims, inputs), _launch(Scope.DECODE, dims, inputs)
    triton_attention.run_decode(ours, SMALL, splits)
    reference.decode_attention(twin)
    torch.testing.assert_close(ours.writes[0], twin.writes[0])


@pytest.mark.parametrize("window", [None, 20])
def test_prompts_in_triton(window: int | None) -> None:
    inputs, dims = _inputs(), _dims(window)
    ours, twin = _launch(Scope.PREFILL, dims, inputs), _launch(Scope.PREFILL, dims, inputs)
    triton_attention.run_prefill(ours, SMALL)
    reference.prefill_attention(twin)
    torch.testing.assert_close(ours.writes[0], twin.writes[0])


def test_products_do_not_carry_attention_with_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    device, dims = torch.device("cuda"), replace(_dims(None), head_dim=64, num_heads=16)
    for has_sinks in (False, True):
        changed = replace(dims, has_sinks=has_sinks)
        assert hopper_attention.can_attend(device, torch.bfloat16, changed)
        assert hopper.can_carry(device, torch.bfloat16, changed) is not has_sinks


def test_layers_with_a_window_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gpt-oss, whose layers have a window or none in turn, the others run in Gluon."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
    graph = build_graph(preset_config("gpt-oss-20b"), None)
    kernels = kernels_for(torch.device("cuda", 0), torch.bfloat16, graph.layer_operations)
    assert kernels[OpKind.DECODE_ATTENTION] is hopper_attention.decode_attention
    taken: list[str] = []
    monkeypatch.setattr(hopper_attention, "run_decode", lambda *_: taken.append("Gluon"))
    monkeypatch.setattr(hopper_attention, "PAGE_TOKENS", PAGE_SIZE)
    monkeypatch.setattr(triton_attention, "decode_attention", lambda *_: taken.append("Triton"))
    for window in (None, 20):
        hopper_attention.decode_attention_on(_launch(Scope.DECODE, _dims(window), _inputs()), 4)
    assert taken == ["Gluon", "Triton"]


def test_on_a_hopper_sinks_take_no_spills_and_few_registers() -> None:
    (reports,) = compiled("tests.compile_attention")
    assert {name: report["num_spills"] for name, report in reports.items()} == dict.fromkeys(reports, 0)
    for program in ("decode", "prefill"):
        with_sinks, without = reports[f"{program} with sinks"], reports[f"{program} without"]
        assert with_sinks["registers"] <= without["registers"] + 8
        assert with_sinks["shared_bytes"] == without["shared_bytes"]
