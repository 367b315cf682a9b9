"""What a kernel is given: an operation, the rows of its tensors, its weights, and the iteration's index tensors.

Shape legend: T tokens of the batch, B requests, R of them prefill requests, S rows with logits, P pages a table, N
pages of the pool, K KV heads, D head size, G tokens a page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillInputs:
    """What prefill attention reads on the device beside page tables; the arrays may end in padding requests.

    Attributes:
        first_request: Row of the page tables of the first prefill request: how many decodes there are.
        query_start: int32 [R + 1], token of the dense batch at which each prefill request begins, never decreasing.
        context_len: int32 [R], its tokens in the cache once the iteration is done; 0 for padding.
    """

    first_request: int
    query_start: Tensor
    context_len: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInputs:
    """One iteration's index tensors on the device; `executor/inputs.py` makes them of a `DenseBatch`.

    Attributes:
        num_tokens, num_decodes: T, and how many of them are decodes (they come first, one a request).
        token_ids: int64 [T].
        cos, sin: float32 [T, D / 2], rotary embedding at each token's position.
        slots: int64 [T], page * G + offset.
        page_tables: int64 [B, P].
        query_start, context_len: Host copies, [B + 1] and [B]: reference kernels loop over prefill requests.
        decode_context_len: int64 [number of decodes], on the device.
        prefills: The other requests, on the device.
        logit_tokens: int64 [S], tokens whose rows go to the language-model head.
    """

    num_tokens: int
    num_decodes: int
    token_ids: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    page_tables: Tensor
    query_start: list[int]
    context_len: list[int]
    decode_context_len: Tensor
    prefills: PrefillInputs
    logit_tokens: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer, each [N, K, G, D]: one page of one head is one contiguous run."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """An operation made concrete.

    Attributes:
        op: The operation.
        layer: Layer it runs in; 0 outside the layers.
        tokens: Rows of the dense batch it works on (rows with logits, for scope SAMPLED); never empty.
        reads, writes: Rows `tokens` of its tensors, in the operation's order; the KV cache and what is in `inputs`
            (token ids) are left out. `writes` are views to be filled in place.
        weights: Its parameters, in the operation's order.
        inputs: The iteration.
        cache: Keys and values of the layer; None outside the layers.
    """

    op: Operation
    layer: int
    tokens: TokenRange
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    inputs: BatchInputs
    cache: LayerCache | None


Kernel = Callable[[Launch], None]
