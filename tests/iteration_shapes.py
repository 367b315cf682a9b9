"""Shapes of batches whose iterations are timed, real ones without a device."""

from __future__ import annotations

from nanoflow.graph.operation import BatchShape


def shape_of(num_decodes: int, context: int, chunk: int, before: int) -> BatchShape:
    """Equal decodes with so many keys each, and one chunk of a prompt of which so many tokens are computed."""
    return BatchShape(
        num_tokens=num_decodes + chunk,
        num_decode_tokens=num_decodes,
        decode_context=num_decodes * context,
        prefill_context=chunk * before + chunk * (chunk + 1) // 2,
        prefill_kv_tokens=before + chunk if chunk else 0,
        num_sampled=num_decodes + (chunk > 0),
    )
