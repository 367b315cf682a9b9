"""Reference kernels in plain torch, for any device: correct before fast. Tests compare every fast kernel with them.

They write into the given views and store nothing. Norms, rotary embedding and softmax compute in float32 and round
once; products compute in the dtype of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow.graph.operation import AttentionDims, NormDims, OpKind, RowDims
from nanoflow.kernels.kv_fp8 import dequantised, quantised
from nanoflow.kernels.launch import Kernel, Launch, LayerCache, embedding_scale
from nanoflow.kernels.reference_experts import EXPERT_KERNELS

# Most elements of gathered keys in decode attention at once, chosen to fit in a core's cache. Larger groups are several
# times slower on a CPU, because each allocation gets fresh pages from the system.
_MAX_GATHERED_ELEMENTS = 1 << 18


def embed(launch: Launch) -> None:
    """hidden [T, width] = embedding of each token, times the operation's factor."""
    (hidden,) = launch.writes
    ids = launch.inputs.token_ids[launch.tokens.start : launch.tokens.stop]
    torch.index_select(launch.weights[0], 0, ids, out=hidden)
    assert isinstance(launch.op.dims, RowDims)
    scale = embedding_scale(launch.op.dims, hidden.dtype)
    if scale != 1.0:
        hidden.mul_(scale)


def gather_rows(launch: Launch) -> None:
    """Copy the rows that get logits out of the dense batch; the tensor read has all T rows here."""
    (source,), (target,) = launch.reads, launch.writes
    rows = launch.inputs.logit_tokens[launch.tokens.start : launch.tokens.stop]
    torch.index_select(source, 0, rows, out=target)


def rms_norm(launch: Launch) -> None:
    """normed = hidden / sqrt(mean(hidden^2) + eps) * weight, both [T, width]."""
    assert isinstance(launch.op.dims, NormDims)
    (hidden,), (normed,) = launch.reads, launch.writes
    normed.copy_(_normalised(hidden, launch.weights[0], launch.op.dims.eps))


def rms_norm_add(launch: Launch) -> None:
    """hidden [T, width] += x / sqrt(mean(x^2) + eps) * weight, rounded before it is added."""
    assert isinstance(launch.op.dims, NormDims)
    (x, _), (hidden,) = launch.reads, launch.writes
    hidden.add_(_normalised(x, launch.weights[0], launch.op.dims.eps))


def _normalised(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in float32, rounded to the weight's dtype before the weight is multiplied.

    Models are trained with this rounding. With a float32 weight everything is rounded once, at the end.
    """
    exact = rows.float()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (weight * exact.to(weight.dtype)).to(rows.dtype)


def linear(launch: Launch) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T (+ bias [N])."""
    (x,), (out,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    if bias:
        torch.addmm(bias[0], x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)


def linear_add(launch: Launch) -> None:
    """hidden [T, N] += x [T, K] @ weight [N, K]^T (+ bias [N])."""
    (x, _), (hidden,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    if bias:
        hidden.add_(bias[0])
    torch.addmm(hidden, x, weight.t(), out=hidden)


def linear_swiglu(launch: Launch) -> None:
    """out [T, I] = silu(gate) * up of x [T, K] @ weight [2 I, K]^T; the weight has gate rows, then up rows."""
    (x,), (out,), (weight,) = launch.reads, launch.writes, launch.weights
    _swiglu(torch.mm(x, weight.t()), out)


def swiglu(launch: Launch) -> None:
    """out [T, I] = silu(gate) * up, where the input [T, 2 I] has gate, then up."""
    (gate_up,), (out,) = launch.reads, launch.writes
    _swiglu(gate_up, out)


def _swiglu(gate_up: Tensor, out: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def geglu(launch: Launch) -> None:
    """out [T, I] = gelu(gate) * up with the tanh form of GELU, where the input [T, 2 I] has gate, then up."""
    (gate_up,), (out,) = launch.reads, launch.writes
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)


def rope_append(launch: Launch) -> None:
    """Split qkv, normalise q and k heads if the model does, rotate q and k, and write k and v to the cache."""
    dims, cache, rotation = launch.op.dims, launch.cache, launch.rotation
    assert isinstance(dims, AttentionDims) and cache is not None and rotation is not None
    (qkv,), (q_out,) = launch.reads, launch.writes
    parts = torch.split(qkv, [dims.q_width, dims.kv_width, dims.kv_width], dim=-1)
    q, k, v = (part.view(len(qkv), -1, dims.head_dim) for part in parts)
    if launch.weights:
        assert dims.norm_eps is not None
        q_weight, k_weight = launch.weights
        q, k = _normalised(q, q_weight, dims.norm_eps), _normalised(k, k_weight, dims.norm_eps)
    rows = slice(launch.tokens.start, launch.tokens.stop)
    cos, sin = rotation.cos[rows, None], rotation.sin[rows, None]
    q_out.copy_(_rotate(q, cos, sin).flatten(1))
    slots, page_size = launch.pages.slots[rows], cache.keys.shape[2]
    pages, offsets = slots // page_size, slots % page_size
    k = _rotate(k, cos, sin).to(qkv.dtype)
    if cache.scales is None:
        cache.keys[pages, :, offsets], cache.values[pages, :, offsets] = k, v
    else:
        cache.keys[pages, :, offsets], cache.scales[pages, :, offsets, 0] = quantised(k)
        cache.values[pages, :, offsets], cache.scales[pages, :, offsets, 1] = quantised(v)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R) of heads [T, H, D] in float32, with cos and sin [T, 1, R]; copy other dimensions."""
    half = cos.shape[-1]
    first, second, rest = torch.split(heads.float(), [half, half, heads.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def decode_attention(launch: Launch) -> None:
    """Attention of one query a request over its pages. Requests are padded to the longest of a group.

    With a window, pages before it are not looked at: places are counted from the first page that it touches.
    """
    dims, cache, inputs = launch.op.dims, launch.cache, launch.inputs
    assert isinstance(dims, AttentionDims) and cache is not None and inputs.host is not None
    (q,), (out,) = launch.reads, launch.writes
    page_size, window, tokens = cache.keys.shape[2], dims.window, slice(launch.tokens.start, launch.tokens.stop)
    contexts = inputs.host.decode_context_len[tokens]
    tables, lengths = launch.pages.decode_tables[tokens], inputs.decodes.context_len[tokens]
    if window is not None:
        first_pages = (lengths - window).clamp_(min=0) // page_size
        contexts = [context - max(context - window, 0) // page_size * page_size for context in contexts]
        lengths = lengths - first_pages * page_size
        columns = torch.arange(-(-max(contexts) // page_size), device=tables.device)
        tables = tables.gather(1, (first_pages[:, None] + columns).clamp_(max=tables.shape[1] - 1))
    for rows in _groups(contexts, page_size, _MAX_GATHERED_ELEMENTS // dims.kv_width):
        shortest, longest = (end(contexts[row] for row in rows) for end in (min, max))
        index = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else torch.tensor(rows)
        keys, values = _gather(cache, tables[index, : -(-longest // page_size)], q.dtype)
        visible = _visible(lengths[index], keys.shape[2], window)
        # What lies behind a context, or before a window, is another request's, and may not be finite: zero times that
        # is not zero.
        surely_seen = shortest if window is None else 0
        for gathered in (keys, values):
            gathered[:, :, surely_seen:].masked_fill_(~visible[..., surely_seen:].transpose(-1, -2), 0.0)
        # The query heads that share a KV head stand as one more dimension: [B, K, H / K, D].
        grouped = q[index].view(len(rows), dims.num_kv_heads, -1, dims.head_dim)
        if dims.has_sinks:
            sinks = launch.weights[0].view(1, dims.num_kv_heads, -1, 1)
            grouped, keys, values, visible = _with_sinks(grouped, keys, values, visible, sinks / dims.scale)
        result = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=dims.scale)
        out[index] = result[..., : dims.head_dim].reshape(len(rows), -1)


def _with_sinks(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and visible keys of an attention without sinks that gives the same results.

    Each sequence has one more key, which every query sees, with values of 0. One more dimension makes its score: there
    queries hold the sinks, this key 1 and others 0.

    Args:
        q, keys, values: [B, heads, queries or keys, D].
        visible: bool [..., keys].
        sinks: Logits by the scale of the scores, of a shape that expands to that of q.
    """
    wide = torch.cat((q, sinks.to(q.dtype).expand(*q.shape[:-1], 1)), dim=-1)
    keys, values = F.pad(keys, (0, 1, 0, 1)), F.pad(values, (0, 1, 0, 1))
    keys[..., -1, -1] = 1.0
    return wide, keys, values, F.pad(visible, (0, 1), value=True)


def _groups(contexts: list[int], page_size: int, most_keys: int) -> Iterator[list[int]]:
    """Groups of rows that are computed together, by ascending length; lengths in a group differ at most twofold.

    Args:
        contexts: Keys of each row; 0 for a row that is not a decode.
        page_size: Tokens of a page; keys are gathered by whole pages.
        most_keys: Most keys of a group including padding, unless it is a single row.
    """
    by_size: dict[int, list[int]] = {}
    for row, context in enumerate(contexts):
        if context:
            by_size.setdefault((-(-context // page_size) - 1).bit_length(), []).append(row)
    for rows in by_size.values():
        num_keys = -(-max(contexts[row] for row in rows) // page_size) * page_size
        most = max(1, most_keys // num_keys)
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def _gather(cache: LayerCache, page_tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K, P * G, D] of page tables [B, P] in the type of activations.

    The unit of copying is one head of one page.
    """
    batch, num_pages = page_tables.shape
    _, num_kv_heads, page_size, head_dim = cache.keys.shape
    heads = torch.arange(num_kv_heads, device=page_tables.device)[:, None]
    rows = (page_tables[:, None] * num_kv_heads + heads).flatten()
    shape = (batch, num_kv_heads, num_pages * page_size, head_dim)
    keys, values, *rest = (part.flatten(0, 1).flatten(1).index_select(0, rows) for part in cache.parts)
    if not rest:
        return keys.view(shape), values.view(shape)
    scales = rest[0].view(*shape[:3], 2)
    return (
        dequantised(keys.view(shape), scales[..., 0], dtype),
        dequantised(values.view(shape), scales[..., 1], dtype),
    )


def _visible(context_len: Tensor, num_keys: int, window: int | None) -> Tensor:
    """bool [B, 1, 1, num_keys]: whether a key is within the context and the window."""
    places = torch.arange(num_keys, device=context_len.device)
    visible = places < context_len[:, None]
    if window is not None:
        visible &= places >= context_len[:, None] - window
    return visible[:, None, None]


def prefill_attention(launch: Launch) -> None:
    """Causal attention of prompt chunks over all tokens of their context so far, one request at a time."""
    dims, cache, inputs = launch.op.dims, launch.cache, launch.inputs
    assert isinstance(dims, AttentionDims) and cache is not None and inputs.host is not None
    (q,), (out,) = launch.reads, launch.writes
    page_size = cache.keys.shape[2]
    query_start = inputs.host.prefill_query_start
    for request, context_len in enumerate(inputs.host.prefill_context_len):
        chunk_start, chunk_stop = query_start[request], query_start[request + 1]
        start, stop = max(chunk_start, launch.tokens.start), min(chunk_stop, launch.tokens.stop)
        if start >= stop or not context_len:
            continue
        num_keys = context_len - (chunk_stop - stop)
        # No query sees a key before the window of the first one: what stands there may not be a finite number.
        first = 0 if dims.window is None else max(num_keys - (stop - start) - dims.window + 1, 0)
        first_page, num_pages = first // page_size, -(-num_keys // page_size)
        tables = launch.pages.prefill_tables[request : request + 1, first_page:num_pages]
        seen = slice(first - first_page * page_size, num_keys - first_page * page_size)
        keys, values = (gathered[:, :, seen] for gathered in _gather(cache, tables, q.dtype))
        rows = slice(start - launch.tokens.start, stop - launch.tokens.start)
        heads = q[rows].view(1, stop - start, dims.num_heads, dims.head_dim).transpose(1, 2)
        result = _causal_attention(heads, keys, values, dims, *launch.weights)
        out[rows] = result.transpose(1, 2).reshape(stop - start, -1)


def _causal_attention(
    q: Tensor, keys: Tensor, values: Tensor, dims: AttentionDims, sinks: Tensor | None = None
) -> Tensor:
    """Attention of queries [1, H, Q, D], which are at the last Q of the C positions of keys and values [1, K, C, D]."""
    num_queries, num_keys, window = q.shape[2], keys.shape[2], dims.window
    if num_queries == num_keys and window is None and sinks is None:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=dims.scale, enable_gqa=True)
    query_places = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    key_places = torch.arange(num_keys, device=q.device)
    visible = key_places <= query_places
    if window is not None:
        visible &= key_places > query_places - window
    if sinks is not None:
        q, keys, values, visible = _with_sinks(q, keys, values, visible, sinks.view(1, -1, 1, 1) / dims.scale)
    result = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=dims.scale, enable_gqa=True)
    return result[..., : dims.head_dim]


# Without LINEAR_SWIGLU, which would gain nothing here; graphs are fused only for devices that gain from it.
REFERENCE_KERNELS: dict[OpKind, Kernel] = {
    OpKind.EMBED: embed,
    OpKind.GATHER_ROWS: gather_rows,
    OpKind.RMS_NORM: rms_norm,
    OpKind.RMS_NORM_ADD: rms_norm_add,
    OpKind.LINEAR: linear,
    OpKind.LINEAR_ADD: linear_add,
    OpKind.ROPE_APPEND: rope_append,
    OpKind.DECODE_ATTENTION: decode_attention,
    OpKind.PREFILL_ATTENTION: prefill_attention,
    OpKind.SWIGLU: swiglu,
    OpKind.GEGLU: geglu,
    **EXPERT_KERNELS,
}
