"""Sizes and costs of what a mixture of experts computes: routing, the order of rows by expert, grouped products.

It knows counts of tokens alone, no batches and no graph: `operation.py` gives it the tokens of an operation. A router
chooses K of E experts for each token. The rows of a token range are then sorted by expert, which makes of the layer two
grouped products, each one launch. The weights of an expert are read only if some token chose it, so bytes depend on how
many experts the tokens touch; `Routing` says how many are to be expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How tokens choose experts.

    Attributes:
        num_experts: E, experts of a layer.
        num_per_token: K, different experts that a token passes.
        skew: How unevenly experts are chosen, for costs alone: expert i is as popular as 1 / (i + 1) ** skew, up to
            one choice a token. 0 is balanced.
    """

    num_experts: int
    num_per_token: int
    skew: float = 0.0

    @property
    def popularity(self) -> tuple[float, ...]:
        """The part of all tokens that passes each expert; the sum is K."""
        return _popularity(self.num_experts, self.num_per_token, self.skew)

    def num_touched(self, num_tokens: int) -> float:
        """Expected experts that some of these tokens pass: E (1 - (1 - K / E) ** tokens) if balanced."""
        if not self.skew:
            return self.num_experts * (1.0 - (1.0 - self.num_per_token / self.num_experts) ** num_tokens)
        return sum(1.0 - (1.0 - part) ** num_tokens for part in self.popularity)

    def load(self, num_tokens: int) -> tuple[float, ...]:
        """Expected rows of each expert, the most popular first; the sum is K x tokens."""
        return tuple(part * num_tokens for part in self.popularity)


@lru_cache(maxsize=64)
def _popularity(num_experts: int, num_per_token: int, skew: float) -> tuple[float, ...]:
    """In proportion to weights; what exceeds one choice a token is dealt out to the less popular experts."""
    weights = [(place + 1) ** -skew for place in range(num_experts)]
    for num_full in range(num_per_token + 1):
        factor = (num_per_token - num_full) / (sum(weights[num_full:]) or 1.0)
        if num_full == num_per_token or factor * weights[num_full] <= 1.0:
            return (*(1.0,) * num_full, *(factor * weight for weight in weights[num_full:]))
    raise AssertionError("with K full experts nothing is left to deal out")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterDims:
    """The product [tokens, in_features] x [E, in_features]^T, its softmax, and the K largest probabilities.

    A softmax over the K largest products alone is the same as `is_normalised`: what the others would add cancels.

    Attributes:
        in_features: Width of a token's row.
        routing: E and K.
        is_normalised: Whether the K probabilities are divided by their sum.
    """

    in_features: int
    routing: Routing
    is_normalised: bool

    def flops(self, num_tokens: int) -> int:
        """Of the product."""
        return 2 * num_tokens * self.in_features * self.routing.num_experts

    def elements(self, num_tokens: int) -> int:
        """Weights, rows, and K probabilities and experts a token."""
        written = 2 * self.routing.num_per_token
        return self.in_features * self.routing.num_experts + num_tokens * (self.in_features + written)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderDims:
    """The rows of a token range (K a token) sorted by expert, and where each expert's rows end."""

    routing: Routing

    def flops(self, num_tokens: int) -> int:
        """None."""
        return 0

    def elements(self, num_tokens: int) -> int:
        """The experts read, the order and the ends written."""
        return 2 * num_tokens * self.routing.num_per_token + self.routing.num_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiglu:
    """The activation (up + 1) * gate * sigmoid(alpha * gate) of values that are clamped first (gpt-oss).

    Attributes:
        alpha: Factor on the gate in the sigmoid.
        limit: Most of the gate, which has no least; most and, negated, least of up.
    """

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDims:
    """A grouped product: each row with the matrix [out_features, in_features] of its expert.

    Attributes:
        in_features, out_features: Of one expert; a gated activation halves what is written.
        routing: E, K and the skew.
        is_gated: Whether it is the first product, which reads a token's row once for all of its experts and ends with
            the activation. The second one has a row of its own for each expert of a token.
        has_bias: Whether each expert adds a bias of its own to the product: a second weight [E, out_features].
        clamped: The activation of the first product; None for silu(gate) * up.
    """

    in_features: int
    out_features: int
    routing: Routing
    is_gated: bool
    has_bias: bool = False
    clamped: ClampedSwiglu | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a product, and perhaps silu(gate) * up, without anything else."""
        return not self.has_bias and self.clamped is None

    @property
    def num_idle_weights(self) -> int:
        """Weights of one layer that a token does not pass."""
        of_expert = (self.in_features + self.has_bias) * self.out_features
        return (self.routing.num_experts - self.routing.num_per_token) * of_expert

    def flops(self, num_tokens: int) -> int:
        """Of the product: a token passes K experts."""
        return 2 * num_tokens * self.routing.num_per_token * self.in_features * self.out_features

    def touched_weights(self, num_tokens: int) -> int:
        """Weights of the experts that are expected to be touched."""
        return round(self.routing.num_touched(num_tokens) * self.in_features * self.out_features)

    def elements(self, num_tokens: int) -> int:
        """Weights of the experts that are expected to be touched, and rows."""
        weights = self.touched_weights(num_tokens)
        num_rows = num_tokens * self.routing.num_per_token
        if self.is_gated:
            return weights + num_tokens * self.in_features + num_rows * (self.out_features // 2)
        return weights + num_rows * (self.in_features + self.out_features)

    def fp8_bytes(self, num_tokens: int, dtype_bytes: int) -> int:
        """Weights and rows in FP8 with scales in float32, and what is written in the model's type."""
        num_rows, scaled = num_tokens * self.routing.num_per_token, self.in_features + 4
        num_read, num_written = (num_tokens, self.out_features // 2) if self.is_gated else (num_rows, self.out_features)
        weights = round(self.routing.num_touched(num_tokens) * self.out_features * scaled)
        return weights + num_read * scaled + num_rows * num_written * dtype_bytes

    def mxfp4_bytes(self, num_tokens: int, dtype_bytes: int) -> int:
        """Rows in the model's type; a weight has 4 bits, and 32 of them share a scale of a byte."""
        weights = self.touched_weights(num_tokens)
        return weights * 17 // 32 + (self.elements(num_tokens) - weights) * dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineDims:
    """The weighted sum of the rows that a token has from its K experts, added to the residual stream."""

    width: int
    routing: Routing

    def flops(self, num_tokens: int) -> int:
        """A multiply-add for each element of each row."""
        return 2 * num_tokens * self.routing.num_per_token * self.width

    def elements(self, num_tokens: int) -> int:
        """Rows and weights, and the residual read and written."""
        return num_tokens * (self.routing.num_per_token * (self.width + 1) + 2 * self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedGateDims:
    """The activation of a shared expert, `width` elements, times the sigmoid of a product of `in_features` elements."""

    in_features: int
    width: int

    def flops(self, num_tokens: int) -> int:
        """Of the product, and of the multiplication."""
        return num_tokens * (2 * self.in_features + self.width)

    def elements(self, num_tokens: int) -> int:
        """The gate's weights, the token's row, and the activation read and written."""
        return self.in_features + num_tokens * (self.in_features + 2 * self.width)


RoutedDims = RouterDims | OrderDims | ExpertDims | CombineDims | SharedGateDims
