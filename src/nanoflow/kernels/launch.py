"""The inputs of a kernel: an operation, rows of its tensors, its weights, and the iteration's index tensors.

Shape legend: T tokens, D tokens that may be decodes, R prefill chunks, S rows with logits, P pages of a page table, N
pages of the pool, K KV heads, G tokens of a page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation, RowDims, Scope

# Shares of a decode attention that is carried by products are counted in this many parts.
SHARES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeInputs:
    """Inputs of decode attention, one entry for each of the first D tokens of the batch.

    Attributes:
        context_len: int32 [D], tokens in the cache once the iteration is done; 0 for a token that is no decode.
        key_blocks: int32 [D + 1], blocks of `KEY_BLOCK` keys before each token, and all; a context fills its last one.
    """

    context_len: Tensor
    key_blocks: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillInputs:
    """Inputs of prefill attention, one entry for each chunk of a prompt, or for each part if a nano-batch cuts a chunk.

    Attributes:
        query_start: int32 [R + 1], token of the dense batch at which each begins, never decreasing.
        context_len: int32 [R], its request's tokens in the cache once it is done; 0 for padding and for gaps, whose
            tokens are decodes.
    """

    query_start: Tensor
    context_len: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PageInputs:
    """Where the layers of one KV group have their keys and values.

    With a sliding window, pages that no token of the iteration sees may be another request's by now: table entries for
    them are out of date, and what stands there may be anything, NaN too.

    Attributes:
        slots: int32 [T], where those of each token are written: page * page size + offset.
        decode_tables: int32 [D, P], page tables for decode attention.
        prefill_tables: int32 [R, P], page tables for prefill attention.
    """

    slots: Tensor
    decode_tables: Tensor
    prefill_tables: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLengths:
    """Copies on the host for kernels that loop over requests: of decodes [D], and of prefills [R + 1] and [R]."""

    decode_context_len: list[int]
    prefill_query_start: list[int]
    prefill_context_len: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """A rotary embedding at each token's position: cos and sin, float32 [T, number of rotated pairs]."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInputs:
    """One iteration's index tensors on the device; `executor/inputs.py` makes them from a `DenseBatch`.

    They may be larger than the batch. Padding has slots outside the cache and contexts of 0, and D may exceed the
    number of decodes. So contexts on the device decide whether a token belongs to decode or to prefill attention, not
    its index.

    Attributes:
        token_ids: int64 [T].
        rotations: Of each rotary embedding, in the order of `OpGraph.ropes`.
        pages: Of each KV group.
        decodes, prefills: For the two attentions.
        first_prefill_token: No token before it is of a prefill.
        logit_tokens: int32 [S], tokens whose rows go to the language-model head.
        host: Lengths for kernels that need them on the host; None while a CUDA graph is captured.
    """

    token_ids: Tensor
    rotations: tuple[Rotation, ...]
    pages: tuple[PageInputs, ...]
    decodes: DecodeInputs
    prefills: PrefillInputs
    first_prefill_token: int
    logit_tokens: Tensor
    host: HostLengths | None

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens with padding."""
        return self.token_ids.shape[0]

    def tokens_in(self, scope: Scope) -> TokenRange:
        """The tokens among which those of a scope are."""
        first, stop = _ROWS[scope](self)
        return TokenRange(start=min(first, stop), stop=stop)


_ROWS: dict[Scope, Callable[[BatchInputs], tuple[int, int]]] = {
    Scope.ALL: lambda inputs: (0, inputs.num_tokens),
    Scope.DECODE: lambda inputs: (0, inputs.decodes.context_len.shape[0]),
    Scope.PREFILL: lambda inputs: (
        inputs.first_prefill_token,
        inputs.num_tokens if inputs.prefills.context_len.shape[0] else 0,
    ),
    Scope.SAMPLED: lambda inputs: (0, inputs.logit_tokens.shape[0]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer: one page of one head is one contiguous run.

    Attributes:
        keys, values: [N, K, G, head size], in the type of activations, or float8_e4m3fn with scales.
        scales: bfloat16 [N, K, G, 2], of each key and of each value (`kv_fp8.py`); None without.
        group: The layer's KV group: the place in `BatchInputs.pages` of the page tables that belong to these pages.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor | None = None
    group: int = 0

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors of which page p is `[p]`."""
        return (self.keys, self.values) if self.scales is None else (self.keys, self.values, self.scales)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of an operation.

    Attributes:
        op: The operation.
        layer: Index of its layer; 0 outside the layers.
        tokens: Rows of the dense batch that it works on (rows with logits, for scope SAMPLED); never empty.
        reads, writes: Rows `tokens` of its tensors, in the operation's order, without the KV cache and tensors in
            `inputs` (token ids). `writes` are views to write into.
        weights: Its parameters, in the operation's order.
        inputs: Index tensors of the iteration.
        cache: Keys and values of the layer; None outside the layers.
        rotation: Rotary embedding of the layer for all tokens; None outside the layers.
    """

    op: Operation
    layer: int
    tokens: TokenRange
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    inputs: BatchInputs
    cache: LayerCache | None
    rotation: Rotation | None = None

    @property
    def pages(self) -> PageInputs:
        """Page tables and slots for the cache of the layer."""
        assert self.cache is not None
        return self.inputs.pages[self.cache.group]


Kernel = Callable[[Launch], None]


def embedding_scale(dims: RowDims, dtype: torch.dtype) -> float:
    """The factor on an embedding, rounded to the model's dtype before use, as models are trained."""
    return dims.scale if dims.scale == 1.0 else float(torch.tensor(dims.scale, dtype=dtype))
