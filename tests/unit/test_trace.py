"""Measured timelines: kernels put down to nano-operations, from events and from a file of torch's profiler."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape, Resource
from nanoflow.graph.shard import Exchange, shard
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.timeline.trace import (
    KERNEL_RULES,
    KernelEvent,
    KernelRule,
    TraceError,
    read_chrome_trace,
    timeline_of_trace,
)

GRAPH = build_graph(preset_config("llama-3.2-1b"), None)
TOKENS, DECODES, NUM_LAYERS = 256, 64, 6
SHAPE = BatchShape(num_tokens=TOKENS, num_decode_tokens=DECODES, decode_context=DECODES * 100)
PRODUCT = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"
KERNELS = {
    "attn_norm": ["_rms_norm"],
    "ffn_norm": ["_rms_norm"],
    "qkv_proj": [PRODUCT],
    "rope_append": ["_rope_append"],
    "decode_attention": ["decode_program", "merge_program"],
    "prefill_attention": ["prefill_program"],
    "o_proj": ["void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "cublasLt::splitKreduce_kernel<32>"],
    "gate_up_proj": ["_linear_swiglu"],
    "activation": ["_swiglu"],
    "down_proj": ["sm90_xmma_gemm_bf16bf16_bf16f32_tn_n_tilesize128x128x64"],
}
STREAMS = {"attention": 20}


class Recorder:
    """Runs kernels of 1 us, one after the other, and notes them."""

    def __init__(self) -> None:
        self.events: list[KernelEvent] = []
        self._now_us = 1000.0

    def skip_to(self, now_us: float) -> None:
        """Be idle until then."""
        self._now_us = now_us

    def launch(self, name: str, stream: int = 7) -> None:
        start_us, self._now_us = self._now_us, self._now_us + 1
        self.events.append(KernelEvent(name=name, start_us=start_us, stop_us=self._now_us, stream=stream))

    def iteration(self, plan: PipelinePlan, shape: BatchShape = SHAPE, num_layers: int = NUM_LAYERS) -> None:
        """As the executor does: the embedding, the layers in issue order, the epilogue, sampling."""
        self.launch("_gather")
        for _, nano in plan.issue_order(num_layers):
            first, stop = {
                "decode_attention": (0, shape.num_decode_tokens),
                "prefill_attention": (shape.num_decode_tokens, shape.num_tokens),
            }.get(nano.operation, (0, shape.num_tokens))
            if nano.tokens.clip(first, stop).num_tokens:
                for name in KERNELS[nano.operation]:
                    self.launch(name, STREAMS.get(nano.lane, 7))
        for name in ("_gather", "_rms_norm", PRODUCT, "at::native::elementwise_kernel<128>"):
            self.launch(name)


def recorded(plan: PipelinePlan, iterations: int = 3) -> list[KernelEvent]:
    recorder = Recorder()
    for _ in range(iterations):
        recorder.iteration(plan)
    return recorder.events


def test_kernels_of_the_same_name_go_to_operations_in_issue_order() -> None:
    timeline = timeline_of_trace(
        reversed(recorded(sequential_plan(GRAPH, TOKENS))),
        sequential_plan(GRAPH, TOKENS),
        SHAPE,
        num_layers=NUM_LAYERS,
        num_shown=2,
        resources={op.name: op.resource for op in GRAPH.layer},
    )
    assert timeline.name == "sequential, measured"
    assert [(span.operation, span.layer) for span in timeline.spans] == [
        (op.name, layer) for layer in range(2) for op in GRAPH.layer
    ]
    # Ten operations and two that take a second kernel, 1 us each.
    spans = {span.operation: span for span in timeline.spans if span.layer == 0}
    assert timeline.spans[0].start_s == 0 and timeline.period_s == pytest.approx(12e-6)
    assert spans["decode_attention"].stop_s - spans["decode_attention"].start_s == pytest.approx(2e-6)
    assert spans["o_proj"].stop_s - spans["o_proj"].start_s == pytest.approx(2e-6)
    assert spans["down_proj"].stop_s - spans["down_proj"].start_s == pytest.approx(1e-6)
    assert spans["decode_attention"].resource is Resource.MEMORY


def test_it_is_the_middle_iteration_and_its_middle_layers() -> None:
    plan = sequential_plan(GRAPH, TOKENS)
    recorder = Recorder()
    for first_us in (0.0, 1e6, 3e6):
        recorder.skip_to(first_us)
        recorder.iteration(plan)
    # Only the middle iteration is slow, and it more and more so.
    events = [
        replace(event, stop_us=event.stop_us + (event.start_us - 1e6) / 100 if 1e6 <= event.start_us < 3e6 else 0)
        for event in recorder.events
    ]
    timeline = timeline_of_trace(events, plan, SHAPE, num_layers=NUM_LAYERS, num_shown=2)
    # Layers 2 and 3 of 6: the embedding and two layers of 12 kernels come before.
    assert timeline.spans[0].stop_s == pytest.approx((1 + 25 / 100) * 1e-6)
    first = timeline_of_trace(events, plan, SHAPE, num_layers=NUM_LAYERS, first_layer=0, num_shown=1)
    assert first.spans[0].stop_s == pytest.approx((1 + 1 / 100) * 1e-6)
    assert first.period_s == first.duration_s


def test_lanes_stages_and_nano_operations_without_tokens() -> None:
    lanes = (Lane(name="gemm", share=0.7), Lane(name="attention", share=0.3))
    plan = PipelinePlan(
        name="overlapped",
        num_tokens=TOKENS,
        lanes=lanes,
        nano_operations=tuple(
            NanoOperation(
                operation=op.name,
                start=start,
                stop=stop,
                lane="attention" if op.name == "decode_attention" else "gemm",
                stage=start // 128,
            )
            for start, stop in ((0, 128), (128, 256))
            for op in GRAPH.layer
        ),
    )
    timeline = timeline_of_trace(recorded(plan), plan, SHAPE, num_layers=NUM_LAYERS)
    # All decodes are in the first half.
    attention = [span for span in timeline.spans if span.lane == "attention"]
    assert [(span.operation, span.start_token, span.layer, span.share) for span in attention] == [
        ("decode_attention", 0, layer, 0.3) for layer in range(3)
    ]
    second_half = [span.start_s for span in timeline.spans if span.start_token == 128 and span.layer == 0]
    next_layer = [span.start_s for span in timeline.spans if span.start_token == 0 and span.layer == 1]
    assert min(next_layer) < min(second_half)
    assert len(timeline.spans) == 3 * (2 * len(GRAPH.layer) - 1)


def test_a_fused_product_may_take_two_kernels() -> None:
    fused = fuse_swiglu(GRAPH)
    plan = sequential_plan(fused, TOKENS)
    recorder = Recorder()
    kernels = {**KERNELS, "gate_up_proj": [PRODUCT, "_swiglu"]}
    for _, nano in plan.issue_order(NUM_LAYERS):
        for name in kernels[nano.operation]:
            recorder.launch(name)
    recorder.launch("_rms_norm")
    recorder.launch(PRODUCT)
    timeline = timeline_of_trace(recorder.events, plan, SHAPE, num_layers=NUM_LAYERS)
    gate_up = next(span for span in timeline.spans if span.operation == "gate_up_proj")
    assert gate_up.stop_s - gate_up.start_s == pytest.approx(2e-6)
    assert timeline.period_s == pytest.approx(12e-6)


@pytest.mark.parametrize("graph", [GRAPH, *(shard(GRAPH, 2, exchange) for exchange in Exchange)])
def test_every_operation_of_a_layer_has_a_rule(graph: OpGraph) -> None:
    ruled = frozenset().union(*(rule.operations for rule in KERNEL_RULES))
    assert {op.name for op in graph.layer} <= ruled


def test_what_does_not_fit_is_refused_with_the_culprit() -> None:
    plan, events = sequential_plan(GRAPH, TOKENS), recorded(sequential_plan(GRAPH, TOKENS))

    def measured(kept: list[KernelEvent], **options: Any) -> None:
        timeline_of_trace(kept, plan, SHAPE, **{"num_layers": NUM_LAYERS, **options})

    half = nanobatch_plan(GRAPH, TOKENS, [128])
    with pytest.raises(TraceError, match="39 kernels for attn_norm/ffn_norm, the plan launches 15 an iteration"):
        measured(events, num_layers=7)
    with pytest.raises(TraceError, match="kernels for attn_norm/ffn_norm, the plan launches 25 an iteration"):
        timeline_of_trace(events, half, SHAPE, num_layers=NUM_LAYERS)
    with pytest.raises(TraceError, match="the trace has 0 kernels for rope_append"):
        measured([event for event in events if event.name != "_rope_append"])
    with pytest.raises(TraceError, match="no rule says what the kernels of attn_norm, ffn_norm"):
        measured(events, rules=KERNEL_RULES[1:])
    with pytest.raises(ValueError, match="layers 5 to 7 are not all there, the model has 6"):
        measured(events, first_layer=5)


def test_rules_are_data() -> None:
    rule = KernelRule(operations=frozenset({"mine"}), kernel="^mine$")
    plan = PipelinePlan(
        name="p",
        num_tokens=8,
        lanes=(Lane(name="a"),),
        nano_operations=(NanoOperation(operation="mine", start=0, stop=8, lane="a"),),
    )
    event = KernelEvent(name="mine", start_us=5, stop_us=9, stream=1)
    timeline = timeline_of_trace([event], plan, BatchShape(num_tokens=8), num_layers=1, rules=(rule,))
    (span,) = timeline.spans
    assert span.start_s == 0 and span.stop_s == pytest.approx(4e-6) and span.resource is None


# --- files -----------------------------------------------------------------------------------------------------------


def kernels(number: int) -> Iterator[dict[str, Any]]:
    for place in range(number):
        yield {
            "ph": "X",
            "cat": "kernel",
            "name": f"kernel_{place}",
            "ts": 10.5 + place,
            "dur": 0.25,
            "args": {"stream": 7, "device": 0},
        }


def test_a_chrome_trace_is_read(tmp_path: Path) -> None:
    others = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 2}, {"ph": "M", "name": "process_name"}]
    document = json.dumps({"schemaVersion": 1, "traceEvents": [*others, *kernels(2)]})
    path, packed = tmp_path / "trace.json", tmp_path / "trace.json.gz"
    path.write_text(document)
    packed.write_bytes(gzip.compress(document.encode()))
    assert read_chrome_trace(path) == read_chrome_trace(packed)
    assert read_chrome_trace(path)[1] == KernelEvent(name="kernel_1", start_us=11.5, stop_us=11.75, stream=7)


def test_a_trace_without_a_gpu_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(8) + 1
    profiler.export_chrome_trace(str(path))
    with pytest.raises(TraceError, match="has no kernel: was the GPU profiled"):
        read_chrome_trace(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"{", "is not a trace"),
        (b"\xff", "is not a trace"),
        (b'{"events": []}', "has no traceEvents"),
        (b'[{"cat": "kernel", "ts": 1, "dur": 1, "args": {"stream": 1}}]', "a kernel lacks 'name'"),
        (b'[{"cat": "kernel", "name": "k", "ts": 1, "dur": 1}]', "a kernel lacks 'args'"),
    ],
)
def test_a_bad_trace_is_named(tmp_path: Path, document: bytes, message: str) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(TraceError, match=r"cannot read trace .*trace\.json"):
        read_chrome_trace(path)
    path.write_bytes(document)
    with pytest.raises(TraceError, match=message):
        read_chrome_trace(path)
