"""Choosing tokens from logits: penalties, filters, the draw, and log probabilities. Reference twins in plain torch.

A draw needs one uniform number in [0, 1), which the host computes from (seed, position) alone: the same seed gives
the same tokens on any device, whatever else is in the batch. Legend: S rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each (seed, position), by two rounds of the SplitMix64 finaliser."""
    mixed = _mix(_mix(seeds) + positions.astype(np.uint64) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def apply_penalties(
    logits: Tensor, counts: Tensor, is_in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Penalise tokens already seen, in place.

    Args:
        logits: float32 [S, V].
        counts: int32 [S, V], how often each token was generated.
        is_in_prompt: bool [S, V]; the prompt counts for the repetition penalty only.
        repetition, presence, frequency: float32 [S].
    """
    is_generated = counts > 0
    factor = torch.where(is_generated | is_in_prompt, repetition[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits.sub_(frequency[:, None] * counts).sub_(presence[:, None] * is_generated)


def draw(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: float32 [S, V].
        temperature: float32 [S], > 0.
        uniforms: float64 [S] in [0, 1).

    Returns:
        int64 [S].
    """
    return _invert(torch.softmax(logits / temperature[:, None], dim=-1), uniforms)


def draw_filtered(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """`draw` from the tokens that top_k, min_p and top_p leave.

    Args:
        logits: float32 [S, V].
        temperature: float32 [S], > 0.
        top_k: int64 [S], 0 keeps all.
        top_p, min_p: float32 [S]; 1 and 0 keep all.
        uniforms: float64 [S] in [0, 1).

    Returns:
        int64 [S].
    """
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    ordered, token_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    keep = rank < torch.where(top_k > 0, top_k, ordered.shape[1])[:, None]
    keep &= ordered >= min_p[:, None] * ordered[:, :1]
    # top_p looks at what top_k and min_p left, renormalised; the token that crosses the border is kept.
    left = torch.where(keep, ordered, 0.0).double()
    before = left.cumsum(-1) - left
    keep &= before < top_p[:, None] * left.sum(-1, keepdim=True)
    keep[:, 0] = True
    place = _invert(torch.where(keep, ordered, 0.0), uniforms)
    return token_ids.gather(-1, place[:, None]).squeeze(-1)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place whose cumulative weight exceeds uniform * total; never a place of weight 0."""
    cumulative = weights.double().cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = (weights > 0).int().mul(torch.arange(weights.shape[1], device=weights.device, dtype=torch.int32)).amax(-1)
    return torch.minimum(place, last.long())


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of the given tokens and of the most probable ones.

    Args:
        logits: [S, V], of the model itself: before penalties and temperature.
        token_ids: int64 [S], the tokens that stand there.
        num_top: How many of the most probable to add.

    Returns:
        The fields of `TopLogprobs`: token ids int32 and log probabilities float32 [S, 1 + num_top], ranks int32 [S].
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    values, ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return torch.cat((token_ids[:, None], ids), dim=-1).int(), torch.cat((chosen, values), dim=-1), ranks.int()
