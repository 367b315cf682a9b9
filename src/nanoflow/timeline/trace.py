"""A measured timeline: kernels of a profiler's trace, assigned to the nano-operations of the plan that launched them.

A trace has names and times of kernels, and the kernels of all products share a few names. So kernels are counted. Those
of one kind are launched in the plan's issue order: the k-th kernel of a kind belongs to the k-th nano-operation of that
kind. `KernelRules` maps kernel names to kinds. Neither a GPU nor a profiler is needed.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from nanoflow.errors import brief_line
from nanoflow.graph.operation import BatchShape, Resource, Scope
from nanoflow.plan.plan import NanoOperation, PipelinePlan
from nanoflow.timeline.drawing import span_of
from nanoflow.timeline.timeline import Span, Timeline


class TraceError(ValueError):
    """A trace cannot be read, or does not fit the plan; the message is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEvent:
    """One kernel of the trace."""

    name: str
    start_us: float
    stop_us: float
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRule:
    """A kind: operations whose kernels cannot be told apart by name.

    Attributes:
        operations: Their names in the graph's layer.
        kernel: Regular expression found in the name of a nano-operation's first kernel.
        then: The same for its further kernels on the same stream; None if it has one kernel only.
        scope: Tokens that they work on; a nano-operation without such tokens launches no kernel.
        after_layers: Operations of this kind after the last layer, in order; each launches one kernel.
    """

    operations: frozenset[str]
    kernel: str
    then: str | None = None
    scope: Scope = Scope.ALL
    after_layers: tuple[str, ...] = ()


KernelRules = tuple[KernelRule, ...]

# A kernel belongs to the first rule that matches it and has an operation in the plan.
KERNEL_RULES: KernelRules = (
    KernelRule(operations=frozenset({"attn_norm", "ffn_norm"}), kernel=r"^_rms_norm", after_layers=("final_norm",)),
    KernelRule(operations=frozenset({"attn_post_norm", "ffn_post_norm"}), kernel=r"^_add_rms_norm"),
    KernelRule(operations=frozenset({"rope_append"}), kernel=r"^_rope_append"),
    # The keys of a long context are split over programs, and a second kernel merges the parts.
    KernelRule(
        operations=frozenset({"decode_attention"}),
        kernel=r"^decode_program",
        then=r"^merge_program",
        scope=Scope.DECODE,
    ),
    KernelRule(operations=frozenset({"prefill_attention"}), kernel=r"^prefill_program", scope=Scope.PREFILL),
    KernelRule(operations=frozenset({"activation"}), kernel=r"^_(swi|ge)glu"),
    KernelRule(
        operations=frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        kernel=r"^_linear|nvjet|cutlass|gemm|gemv",
        # The inner dimension of a product may be split, and SwiGLU may be a kernel of its own.
        then=r"(?i)splitk.*reduce|^_swiglu",
        after_layers=("lm_head",),
    ),
    KernelRule(
        operations=frozenset({"o_proj_all_reduce", "down_proj_all_reduce"}),
        kernel=r"(?i)nccl.*allreduce|all_?reduce",
    ),
    KernelRule(
        operations=frozenset({"o_proj_input_all_gather", "o_proj_all_gather"}),
        kernel=r"(?i)nccl.*allgather|all_?gather",
    ),
)


@dataclass(slots=True)
class _Ran:
    """A nano-operation in the trace: its first kernel, and the end of its last kernel."""

    event: KernelEvent
    stop_us: float


def timeline_of_trace(
    events: Iterable[KernelEvent],
    plan: PipelinePlan,
    shape: BatchShape,
    *,
    num_layers: int,
    first_layer: int | None = None,
    num_shown: int = 3,
    rules: KernelRules = KERNEL_RULES,
    resources: Mapping[str, Resource] | None = None,
) -> Timeline:
    """Some layers of the iteration in the middle of a trace.

    Args:
        events: Kernels of one GPU: whole iterations of the plan on batches of the shape, and nothing else whose kernels
            match the rules. Kernels without a rule are ignored.
        plan: The plan that ran.
        shape: The batch; for a CUDA graph, with padding.
        num_layers: Layers of the model.
        first_layer: First layer to show; None for layers in the middle.
        num_shown: How many layers to show, at most those of the model.
        rules: Kinds of kernels.
        resources: The resource of each operation, as far as known.

    Raises:
        TraceError: The kernels do not fit the plan; the message names the kernels and both counts.
        ValueError: The model has no such layers.
    """
    num_shown = min(num_shown, num_layers)
    first = (num_layers - num_shown) // 2 if first_layer is None else first_layer
    if num_shown < 1 or not 0 <= first <= num_layers - num_shown:
        raise ValueError(f"layers {first} to {first + num_shown - 1} are not all there, the model has {num_layers}")
    planned = {nano.operation for nano in plan.nano_operations}
    used = tuple(rule for rule in rules if rule.operations & planned)
    unknown = planned - frozenset().union(*(rule.operations for rule in used))
    if unknown:
        raise TraceError(f"no rule says what the kernels of {', '.join(sorted(unknown))} are called")
    by_rule = _ran(events, used)
    spans: list[Span] = []
    for rule in used:
        launched = _launched(rule, plan, shape, num_layers)
        for layer, nano, ran in _assigned(rule, launched, by_rule[rule]):
            if first <= layer < first + num_shown:
                start_s, stop_s = ran.event.start_us * 1e-6, ran.stop_us * 1e-6
                spans.append(span_of(plan, nano, layer - first, start_s, stop_s, resources or {}))
    if not spans:
        raise TraceError(f"no kernel in the trace belongs to layers {first} to {first + num_shown - 1}")
    return _from_zero(f"{plan.name}, measured", spans)


def _ran(events: Iterable[KernelEvent], rules: KernelRules) -> dict[KernelRule, list[_Ran]]:
    """The nano-operations found by each rule, in order of their start."""
    compiled = [(rule, re.compile(rule.kernel), None if rule.then is None else re.compile(rule.then)) for rule in rules]
    found: dict[KernelRule, list[_Ran]] = defaultdict(list)
    last_on: dict[tuple[KernelRule, int], _Ran] = {}
    for event in sorted(events, key=lambda event: (event.start_us, event.stop_us, event.stream)):
        for rule, kernel, then in compiled:
            before = last_on.get((rule, event.stream))
            if then is not None and before is not None and then.search(event.name):
                before.stop_us = max(before.stop_us, event.stop_us)
                break
            if kernel.search(event.name):
                ran = _Ran(event=event, stop_us=event.stop_us)
                last_on[rule, event.stream] = ran
                found[rule].append(ran)
                break
    return found


def _launched(
    rule: KernelRule, plan: PipelinePlan, shape: BatchShape, num_layers: int
) -> list[tuple[int, NanoOperation | None]]:
    """What one iteration launches of a kind: (layer, nano-operation), or None for operations after the layers."""
    start, stop = {
        Scope.DECODE: (0, shape.num_decode_tokens),
        Scope.PREFILL: (shape.num_decode_tokens, shape.num_tokens),
    }.get(rule.scope, (0, shape.num_tokens))
    launched: list[tuple[int, NanoOperation | None]] = [
        (layer, nano)
        for layer, nano in plan.issue_order(num_layers)
        if nano.operation in rule.operations and nano.tokens.clip(start, stop).num_tokens
    ]
    return launched + [(num_layers, None) for _ in rule.after_layers]


def _assigned(
    rule: KernelRule, launched: list[tuple[int, NanoOperation | None]], ran: list[_Ran]
) -> Iterator[tuple[int, NanoOperation, _Ran]]:
    """The kernels of the iteration in the middle of the trace, with the nano-operations they belong to."""
    names = "/".join(sorted(rule.operations))
    if not launched and not ran:
        return
    if not launched or not ran or len(ran) % len(launched):
        raise TraceError(
            f"the trace has {len(ran)} kernels for {names}, the plan launches {len(launched)} an iteration: is it of "
            "whole iterations with this plan and this many tokens and decodes?"
        )
    begin = len(ran) // len(launched) // 2 * len(launched)
    for (layer, nano), kernel in zip(launched, ran[begin : begin + len(launched)], strict=True):
        if nano is not None:
            yield layer, nano, kernel


def _from_zero(name: str, spans: list[Span]) -> Timeline:
    begin_s = min(span.start_s for span in spans)
    shifted = [replace(span, start_s=span.start_s - begin_s, stop_s=span.stop_s - begin_s) for span in spans]
    num_layers = max(span.layer for span in spans) + 1
    ends_s = [max(span.stop_s for span in shifted if span.layer == layer) for layer in range(num_layers)]
    period_s = (ends_s[-1] - ends_s[0]) / (num_layers - 1) if num_layers > 1 else ends_s[0]
    return Timeline(name=name, spans=tuple(sorted(shifted, key=lambda span: span.start_s)), period_s=period_s)


def read_chrome_trace(path: Path) -> list[KernelEvent]:
    """Kernels of a trace in Chrome's format, as torch's profiler writes it, possibly compressed (.gz).

    Raises:
        TraceError: The file cannot be read, is no such trace, or has no kernel.
    """
    try:
        document = path.read_bytes()
        content = msgspec.json.decode(gzip.decompress(document) if path.suffix == ".gz" else document)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"cannot read trace {path}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path} is not a trace: {brief_line(error)}") from None
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise TraceError(f"{path} is not a trace: it has no traceEvents")
    kernels = [_kernel(event, path) for event in events if isinstance(event, dict) and event.get("cat") == "kernel"]
    if not kernels:
        raise TraceError(f"{path} has no kernel: was the GPU profiled?")
    return kernels


def _kernel(event: dict[str, Any], path: Path) -> KernelEvent:
    try:
        start_us = float(event["ts"])
        return KernelEvent(
            name=str(event["name"]),
            start_us=start_us,
            stop_us=start_us + float(event["dur"]),
            stream=int(event["args"]["stream"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}: a kernel lacks {error}") from None
