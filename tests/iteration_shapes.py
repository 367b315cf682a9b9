"""Shapes of batches whose iterations are timed, made without a device."""

from __future__ import annotations

from nanoflow.graph.operation import BatchShape


def shape_of(num_decodes: int, context: int, chunk: int, before: int) -> BatchShape:
    """Equal decodes with `num_keys` keys each, and one chunk of a prompt after some computed tokens."""
    return BatchShape(
        num_tokens=num_decodes + chunk,
        num_decode_tokens=num_decodes,
        decode_context=num_decodes * context,
        prefill_context=chunk * before + chunk * (chunk + 1) // 2,
        prefill_kv_tokens=before + chunk if chunk else 0,
        num_sampled=num_decodes + (chunk > 0),
    )
