"""A model on its device, the tensors between its operations, and how an operation becomes a `Launch`.

This file binds names to tensors. It has no order of operations; the executor has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoflow.graph.graph import Element, OpGraph
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import KvType, Operation, OpKind, Scope
from nanoflow.kernels.kv_fp8 import FP8, SCALE, quantised
from nanoflow.kernels.launch import BatchInputs, Kernel, Launch, LayerCache
from nanoflow.models.weights import Weights
from nanoflow.plan.liveness import bytes_of, place, shapes_of, size_of
from nanoflow.plan.plan import PipelinePlan

# Pages that random numbers in 8 bits are drawn for at once: the numbers take four times the memory of the pages.
_DRAWN_PAGES = 4096
_DTYPES = {Element.FP8: torch.float8_e4m3fn, Element.FLOAT32: torch.float32, Element.INT32: torch.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """Everything about a model that stays the same from iteration to iteration.

    Attributes:
        graph: The model as data.
        dtype: Type of activations.
        weights: Its parameters on the device.
        caches: Keys and values of each layer, and its KV group.
        kernels: One for every kind of operation.
    """

    graph: OpGraph
    dtype: torch.dtype
    weights: Weights
    caches: tuple[LayerCache, ...]
    kernels: dict[OpKind, Kernel]

    @property
    def num_kv_groups(self) -> int:
        """Groups of layers with page tables of their own."""
        return 1 + max(cache.group for cache in self.caches)

    @property
    def device(self) -> torch.device:
        """Device that the model is on."""
        return self.caches[0].keys.device


def allocate_caches(
    graph: OpGraph, *, num_pages: int | Sequence[int], page_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """Keys and values [num_pages, KV heads, page_size, head size] of each layer, in its type, filled with zeros.

    Args:
        graph: The model.
        num_pages: Of each KV group of the model; or a number for all layers, which then are one group.
        page_size: Tokens a page.
        dtype: Type of activations.
        device: Of the tensors.

    Zeroed, because attention multiplies what lies behind a context's end by 0, and 0 x NaN is NaN. On a CPU they take
    memory only where something has been written.

    Raises:
        MemoryError: The system does not give this process enough memory.
    """
    group_of = [0] * graph.num_layers
    if isinstance(num_pages, int):
        num_pages = (num_pages,)
    else:
        for number, members in enumerate(graph.kv_groups):
            for layer in members.layers:
                group_of[layer] = number
    caches = []
    for kind, group in zip(graph.layers, group_of, strict=True):
        slots = (num_pages[group], kind.attention.num_kv_heads, page_size)
        is_fp8 = kind.attention.kv_type is KvType.FP8
        shape, kv_dtype = (*slots, kind.attention.head_dim), FP8 if is_fp8 else dtype
        caches.append(
            LayerCache(
                keys=_zeros(shape, kv_dtype, device),
                values=_zeros(shape, kv_dtype, device),
                scales=_zeros((*slots, 2), SCALE, device) if is_fp8 else None,
                group=group,
            )
        )
    return tuple(caches)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch would write the zeros. With numpy the system provides zeroed memory when a page is first written.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def draw_keys(caches: Iterable[LayerCache], seed: int) -> None:
    """Fill caches with random numbers, for benchmarks on keys that nobody wrote: zeros take a GPU less power."""
    for cache in caches:
        generator = torch.Generator(cache.keys.device).manual_seed(seed)
        for column, part in enumerate((cache.keys, cache.values)):
            if cache.scales is None:
                part.normal_(generator=generator)
                continue
            for begin in range(0, len(part), _DRAWN_PAGES):
                pages = slice(begin, begin + _DRAWN_PAGES)
                drawn = torch.randn(part[pages].shape, generator=generator, device=part.device)
                part[pages], cache.scales[pages, ..., column] = quantised(drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The tensors between operations.

    Attributes:
        model: The model.
        tensors: By name: [tokens, width]; those in `sampled_names` are [rows with logits, width].
        sampled_names: Names of tensors with a row for each row that gets logits.
        rotations: For each layer the index of its rotary embedding in `OpGraph.ropes`.
    """

    model: DeviceModel
    tensors: dict[str, Tensor]
    sampled_names: frozenset[str]
    rotations: tuple[int, ...]

    @staticmethod
    def allocate(
        model: DeviceModel, *, num_tokens: int, num_logits: int, plans: Sequence[PipelinePlan] | None = None
    ) -> Workspace:
        """Tensors for batches up to this number of tokens and of rows with logits.

        Tensors share memory where no plan needs both at the same time. Without plans each has its own.
        """
        graph = model.graph
        sampled_names = frozenset(spec.name for spec in graph.tensors if spec.scope is Scope.SAMPLED)
        shapes = shapes_of(graph, num_tokens=num_tokens, num_logits=num_logits)
        if plans is None:
            tensors = {
                name: torch.empty(shape, dtype=_dtype_of(model, name), device=model.device)
                for name, shape in shapes.items()
            }
        else:
            num_bytes = bytes_of(graph, num_tokens=num_tokens, num_logits=num_logits, dtype_bytes=model.dtype.itemsize)
            tensors = _sharing(model, shapes, num_bytes, plans)
        ropes = graph.ropes
        return Workspace(
            model=model,
            tensors=tensors,
            sampled_names=sampled_names,
            rotations=tuple(ropes.index(kind.rope) for kind in graph.layers),
        )

    def run(self, op: Operation, layer: int, tokens: TokenRange, inputs: BatchInputs) -> None:
        """Run an operation on a token range; `layer` is ignored outside the layers, and is 0 there."""
        model = self.model
        self.model.kernels[op.kind](
            Launch(
                op=op,
                layer=layer,
                tokens=tokens,
                reads=self._views(op, op.reads, tokens),
                writes=self._views(op, op.writes, tokens),
                weights=tuple(self._parameter(name, layer) for name in op.weights),
                inputs=inputs,
                cache=model.caches[layer],
                rotation=inputs.rotations[self.rotations[layer]],
            )
        )

    def run_whole(self, operations: Iterable[Operation], inputs: BatchInputs, layer: int = 0) -> None:
        """Run operations in order, each on all tokens of its scope."""
        for op in operations:
            tokens = inputs.tokens_in(op.scope)
            if tokens.num_tokens:
                self.run(op, layer, tokens, inputs)

    def logits(self, inputs: BatchInputs) -> Tensor:
        """Logits [S, V] of the rows `inputs.logit_tokens`, from the epilogue; overwritten by the next call."""
        self.run_whole(self.model.graph.epilogue, inputs)
        return self.tensors["logits"][: len(inputs.logit_tokens)]

    def hidden(self, inputs: BatchInputs) -> Tensor:
        """Hidden states [S, H] of the rows `inputs.logit_tokens`, as the output projection reads them.

        They are overwritten by the next call, and by that of `logits`.
        """
        *before, output = self.model.graph.epilogue
        self.run_whole(before, inputs)
        return self.tensors[output.reads[0]][: len(inputs.logit_tokens)]

    def _parameter(self, name: str, layer: int) -> Tensor:
        of_layer = self.model.weights.layers[layer]
        return of_layer[name] if name in of_layer else self.model.weights.shared[name]

    def _views(self, op: Operation, names: tuple[str, ...], tokens: TokenRange) -> tuple[Tensor, ...]:
        """Rows `tokens` of the named tensors; a tensor with rows of the other kind is given whole, to gather from."""
        rows, is_sampled = slice(tokens.start, tokens.stop), op.scope is Scope.SAMPLED
        return tuple(
            self.tensors[name][rows] if (name in self.sampled_names) == is_sampled else self.tensors[name]
            for name in names
            if name in self.tensors
        )


def _dtype_of(model: DeviceModel, name: str) -> torch.dtype:
    """The type of a tensor between operations."""
    element = model.graph.tensor(name).element
    return model.dtype if element is Element.MODEL else _DTYPES[element]


def _sharing(
    model: DeviceModel,
    shapes: Mapping[str, tuple[int, int]],
    num_bytes: Mapping[str, int],
    plans: Sequence[PipelinePlan],
) -> dict[str, Tensor]:
    """Tensors of these shapes and sizes, placed in one piece of memory."""
    begins = place(model.graph, plans, num_bytes)
    memory = torch.empty(size_of(begins, num_bytes), dtype=torch.uint8, device=model.device)
    return {
        name: memory[begins[name] : begins[name] + num_bytes[name]].view(_dtype_of(model, name)).view(shape)
        for name, shape in shapes.items()
    }
