"""Sizes of attention, and the type of the keys and values that are cached. `operation.py` has the operations."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class KvType(enum.StrEnum):
    """The type of keys and values in the KV cache.

    MODEL is that of the model's activations. FP8 is 8-bit floating point (e4m3) with a 16-bit scale for the key, and
    one for the value, of each token and KV head.
    """

    MODEL = "auto"
    FP8 = "fp8_e4m3"

    def vector_bytes(self, head_dim: int, dtype_bytes: int) -> int:
        """Bytes of one key, or one value, of a head of this size; `dtype_bytes` are those of an activation."""
        return {KvType.MODEL: head_dim * dtype_bytes, KvType.FP8: head_dim + 2}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionDims:
    """Grouped-query attention.

    Attributes:
        num_heads: Query heads H.
        num_kv_heads: Key and value heads; H is a multiple of it.
        head_dim: Size D of a head.
        scale: Factor on the scores, usually 1 / sqrt(D).
        window: Sliding window (a token attends to itself and the `window - 1` before it); None without one.
        norm_eps: Epsilon of the RMSNorm on each query and key head (Qwen3); None without one.
        rotary_dim: How many first dimensions of a query or key head are rotated; None for all.
        has_sinks: Whether each query head has a learned logit, its only weight, that is one more term of the softmax's
            denominator and stands for no key (gpt-oss).
        kv_type: Type of keys and values in the cache.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    norm_eps: float | None = None
    rotary_dim: int | None = None
    has_sinks: bool = False
    kv_type: KvType = KvType.MODEL

    @property
    def q_width(self) -> int:
        """Width of the queries of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys (or of the values) of one token."""
        return self.num_kv_heads * self.head_dim

    def cached_bytes(self, dtype_bytes: int) -> int:
        """Bytes of the keys and values of one token in the cache; `dtype_bytes` are those of an activation."""
        return 2 * self.num_kv_heads * self.kv_type.vector_bytes(self.head_dim, dtype_bytes)
