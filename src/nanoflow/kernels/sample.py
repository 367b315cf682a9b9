"""Choosing tokens from logits: penalties, filters, the draw, and log probabilities. Reference in plain torch.

A draw uses one uniform number in [0, 1), computed from (seed, position) only. So the same seed gives the same tokens on
any device, whatever else is in the batch. It inverts the cumulative distribution in the order of the vocabulary.
`triton_sample.py` is the fast implementation. Legend: S rows, V vocabulary, R rows of the state table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The numbers that say how a row is sampled. The Triton programs rely on this layout.
NUMBERS = np.dtype(
    [
        ("row", np.int32),  # its row in the tables
        ("position", np.int32),  # of the chosen token in its sequence
        ("seed", np.uint64),
        ("scale", np.float32),  # log2(e) / temperature; 0 chooses the largest logit
        ("top_k", np.int32),  # 0 keeps all
        ("top_p", np.float32),
        ("log_min_p", np.float32),  # log2 of min_p; -infinity keeps all
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("first_free_stop", np.int32),  # first position at which a stop token may be drawn
        ("num_edits", np.int32),  # valid entries of its list of edits
        ("num_biases", np.int32),  # how many of these are biases
        ("has_penalties", np.int32),
        ("is_restricted", np.int32),  # whether some tokens are forbidden
        ("mask", np.int32),  # 1 + its row in the masks; 0 if it has none
        ("unused", np.int32),  # a multiple of 8 bytes
    ]
)
# Bits in the table of seen tokens: whether the prompt has the token, and the largest count of generated ones. A
# forbidden token also has the sign bit.
IN_PROMPT, MAX_COUNT = 1 << 14, (1 << 14) - 1
FORBIDDEN, SEEN_BITS = -(1 << 15), (1 << 15) - 1
# Logits that this reference works on at once, and the most bytes that it needs for each.
_MAX_ELEMENTS, _ELEMENT_BYTES = 1 << 22, 96
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTables:
    """Per-row data for sampling, on the device.

    Attributes:
        seen: int16 [R, V]: how often each token was generated, up to `MAX_COUNT`, plus `IN_PROMPT` if the prompt has
            it, plus `FORBIDDEN` if it may not be chosen. Only read for rows with penalties or forbidden tokens.
        edit_ids: int32 [R, E], ids of tokens with a bias and of stop tokens, ascending; `NUMBERS` says how many are
            valid.
        edit_values: float32 [R, E], added to the logit; -infinity for a stop token.
        masks: int32 [M, ceil(V / 32)], one for each draw that has one: bit i % 32 of word i // 32 says whether token i
            may be chosen.
    """

    seen: Tensor
    edit_ids: Tensor
    edit_values: Tensor
    masks: Tensor


def workspace_bytes(num_rows: int, vocab_size: int) -> int:
    """Most device memory in bytes that the functions of this file need beside their results."""
    return _ELEMENT_BYTES * min(num_rows * vocab_size, max(_MAX_ELEMENTS, vocab_size))


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each (seed, position), by two rounds of the SplitMix64 finaliser."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds) + positions.astype(np.uint64) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def scale_of(temperature: float) -> float:
    """The factor on a logit that gives the base-2 logarithm of an unnormalised probability."""
    return math.log2(math.e) / temperature


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`choose` for rows that all take the largest logit of the model without adjustments."""
    best, token_ids = logits.max(dim=-1)
    return token_ids, best.float()


def choose(logits: Tensor, numbers: Tensor, tables: SampleTables, *, adjusts: bool = True) -> tuple[Tensor, Tensor]:
    """Choose a token for each row, and count it in `seen` if the row has penalties.

    Args:
        logits: [S, V], from the model.
        numbers: int32 [S, 18], the bytes of `NUMBERS` of each row; no two rows have the same row of the tables.
        tables: The tables that `numbers` refer to; `seen` is updated.
        adjusts: Whether a row may have penalties, forbidden tokens, or edits that apply.

    Returns:
        Token ids int64 [S], and the largest adjusted logit of each row, float32 [S]. If that is not finite, neither is
            the model's output, and the token is meaningless.
    """
    del adjusts  # Follows from the numbers here.
    host = numbers.cpu().numpy().view(NUMBERS)[:, 0]
    parts = [_choose(logits[part], host[part], tables) for part in _slices(*logits.shape)]
    token_ids, best = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    penalised = torch.from_numpy(np.flatnonzero(host["has_penalties"])).to(logits.device)
    at = _rows(host, logits.device)[penalised], token_ids[penalised]
    counts = tables.seen[at]
    tables.seen[at] = torch.where(counts & MAX_COUNT < MAX_COUNT, counts + 1, counts).to(torch.int16)
    return token_ids, best


def _choose(raw: Tensor, host: NDArray[np.void], tables: SampleTables) -> tuple[Tensor, Tensor]:
    logits = _adjusted(raw, host, tables)
    best, token_ids = logits.max(dim=-1)
    is_filtered = (host["top_k"] > 0) | (host["top_p"] < 1) | (host["log_min_p"] > -np.inf)
    uniforms = torch.from_numpy(uniform(host["seed"], host["position"].astype(np.int64)))
    # The path depends on a row's own parameters only, so that its draw does not depend on other rows.
    for is_meant in (~is_filtered, is_filtered):
        places = np.flatnonzero((host["scale"] > 0) & is_meant)
        if not len(places):
            continue
        at = torch.from_numpy(places).to(raw.device)
        scale, *filters = (
            torch.from_numpy(host[name][places]).to(raw.device) for name in ("scale", "top_k", "top_p", "log_min_p")
        )
        args = (logits[at], scale, *(filters if is_filtered[places[0]] else ()), uniforms[places].to(raw.device))
        token_ids[at] = draw_filtered(*args) if is_filtered[places[0]] else draw(*args)
    return token_ids, best.float()


def _adjusted(raw: Tensor, host: NDArray[np.void], tables: SampleTables) -> Tensor:
    """Float32 logits with biases, then penalties; -infinity for tokens that are forbidden or that a mask leaves out."""
    logits = raw.to(torch.float32, copy=True)
    is_held = host["position"] < host["first_free_stop"]
    for place in np.flatnonzero(host["num_edits"] * (is_held | (host["num_biases"] > 0))).tolist():
        row, count = int(host["row"][place]), int(host["num_edits"][place])
        ids, values = tables.edit_ids[row, :count].long(), tables.edit_values[row, :count]
        is_stop = values == -torch.inf
        logits[place].index_put_((ids[~is_stop],), values[~is_stop], accumulate=True)
        if is_held[place]:
            logits[place, ids[is_stop]] = -torch.inf
    places = torch.from_numpy(np.flatnonzero(host["has_penalties"] | host["is_restricted"])).to(raw.device)
    if len(places):
        record = tables.seen[_rows(host, raw.device)[places]].int()
        factors = (torch.from_numpy(host[name].copy()).to(raw.device) for name in _PENALTIES)
        penalised = logits[places]
        is_in_prompt = (record & IN_PROMPT) > 0
        apply_penalties(penalised, record & MAX_COUNT, is_in_prompt, *(factor[places] for factor in factors))
        logits[places] = penalised.masked_fill_(record < 0, -torch.inf)
    masked = torch.from_numpy(np.flatnonzero(host["mask"])).to(raw.device)
    if len(masked):
        words = tables.masks[torch.from_numpy(host["mask"].astype(np.int64)).to(raw.device)[masked] - 1]
        logits[masked] = logits[masked].masked_fill_(~_bits(words, logits.shape[1]), -torch.inf)
    return logits


def _bits(words: Tensor, count: int) -> Tensor:
    """The first bits of each row, bool [M, count] from int32 [M, W]."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :count] > 0


_PENALTIES = ("repetition", "presence", "frequency")


def _rows(host: NDArray[np.void], device: torch.device) -> Tensor:
    return torch.from_numpy(host["row"].astype(np.int64)).to(device)


def _slices(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Divide rows into parts of at most `_MAX_ELEMENTS` logits; for no rows, one empty part."""
    step = max(1, _MAX_ELEMENTS // vocab_size)
    return (slice(first, first + step) for first in range(0, max(num_rows, 1), step))


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


def draw(logits: Tensor, scale: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token for each row by inverting the cumulative distribution in the order of the vocabulary.

    Args:
        logits: float32 [S, V].
        scale: float32 [S], > 0, from `scale_of`.
        uniforms: float64 [S] in [0, 1).

    Returns:
        int64 [S].
    """
    peaks = logits.amax(dim=-1, keepdim=True)
    return _invert(torch.exp2((logits - peaks) * scale[:, None]), uniforms)


def draw_filtered(
    logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """`draw` from the tokens that top_k, min_p and top_p leave; among equal logits lower ids come first.

    Args:
        logits: float32 [S, V].
        scale: float32 [S], > 0, from `scale_of`.
        top_k: int [S], 0 keeps all.
        top_p: float32 [S]; 1 keeps all.
        log_min_p: float32 [S], log2 of min_p; -infinity keeps all.
        uniforms: float64 [S] in [0, 1).

    Returns:
        int64 [S].
    """
    ordered, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    logs = (ordered - ordered[:, :1]) * scale[:, None]
    weights = torch.where(logs >= log_min_p[:, None], torch.exp2(logs), 0.0)
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    weights.masked_fill_(rank >= torch.where(top_k > 0, top_k, ordered.shape[1])[:, None], 0.0)
    # top_p applies to what top_k and min_p left, renormalised; the token at the border is kept.
    sums = weights.cumsum(-1, dtype=torch.float64)
    target = top_p[:, None].double() * sums[:, -1:]
    is_left_out = (sums - weights >= target) & (top_p < 1)[:, None]
    is_left_out[:, 0] = False
    weights.masked_fill_(is_left_out, 0.0)
    return _invert(torch.empty_like(weights).scatter_(-1, token_ids, weights), uniforms)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds uniform * total; never an index of weight 0."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = (weights > 0).int().mul(torch.arange(weights.shape[1], device=weights.device, dtype=torch.int32)).amax(-1)
    return torch.minimum(place, last.long())


def top_logprobs(logits: Tensor, places: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of given tokens and of the most probable ones, equal ones in any order.

    Args:
        logits: [S, V], from the model, before penalties and temperature.
        places: int64 [N], a row of `logits` for each position.
        token_ids: int64 [N], the token at each position.
        num_top: How many of the most probable tokens to add, at most V.

    Returns:
        The fields of `TopLogprobs`: token ids int32 and log probabilities float32 [N, 1 + num_top], ranks int32 [N].
    """
    parts = [
        _top_logprobs(logits[places[part]], token_ids[part], num_top) for part in _slices(len(places), logits.shape[1])
    ]
    ids, logprobs, ranks = (torch.cat(fields) for fields in zip(*parts, strict=True))
    return ids, logprobs, ranks


def _top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    ranks = (logits > logits.gather(-1, token_ids[:, None])).sum(-1) + 1
    values, ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return torch.cat((token_ids[:, None], ids), dim=-1).int(), torch.cat((chosen, values), dim=-1), ranks.int()
