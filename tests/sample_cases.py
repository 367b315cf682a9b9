"""Rows to sample in tests of sampling: every combination of what a request can ask for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoflow.kernels.sample import FORBIDDEN, IN_PROMPT, NUMBERS, SampleTables, scale_of

FILTERS: dict[str, list[Any]] = {
    "top_k": [0, 1, 7, 50, 1500],
    "top_p": [1.0, 0.0, 1e-30, 0.3, 0.95, 0.9999],
    "log_min_p": [-np.inf, -10.0, -2.0, 0.0],
}


def numbers(num_rows: int, first_position: int = 5, **columns: Any) -> Tensor:
    """`NUMBERS` of rows in reverse order of the table, int32 [S, 18]; by default a draw at temperature 0.8."""
    table = np.zeros(num_rows, NUMBERS)
    table["row"] = np.arange(num_rows)[::-1]
    table["position"] = first_position + np.arange(num_rows)
    table["seed"] = np.arange(num_rows, dtype=np.uint64) * np.uint64(0x123456789ABCDEF) + np.uint64(77)
    table["scale"], table["top_p"], table["log_min_p"], table["repetition"] = scale_of(0.8), 1.0, -np.inf, 1.0
    for name, values in columns.items():
        table[name] = values
    return torch.from_numpy(table.view(np.int32).reshape(num_rows, NUMBERS.itemsize // 4))


def filter_columns() -> dict[str, Any]:
    """Every combination of filters at two temperatures: 200 rows."""
    rows = list(itertools.product(*FILTERS.values(), [scale_of(0.8), scale_of(2.5)]))
    return dict(zip((*FILTERS, "scale"), map(list, zip(*rows, strict=True)), strict=True))


def tables(num_rows: int, vocab_size: int, *, seed: int = 0, num_edits: int = 12) -> SampleTables:
    """Random tables: a third of all tokens seen, a fifth forbidden; a third of the edits are stop tokens."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randint(0, 4, (num_rows, vocab_size), generator=generator)
    seen = torch.where(torch.rand(seen.shape, generator=generator) < 0.3, seen, 0)
    seen += IN_PROMPT * (torch.rand(seen.shape, generator=generator) < 0.1)
    is_forbidden = torch.rand(seen.shape, generator=generator) < 0.2
    is_forbidden[:, 0] = False
    seen += FORBIDDEN * is_forbidden
    width = min(num_edits, vocab_size)
    ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:width].sort()[0] for _ in range(num_rows)])
    values = 4 * torch.randn(ids.shape, generator=generator)
    values[torch.rand(ids.shape, generator=generator) < 0.3] = -torch.inf
    # A quarter of all tokens are allowed by a mask, among them token 0 as everywhere.
    words = torch.randint(-(2**31), 2**31, (2, num_rows, -(-vocab_size // 32)), generator=generator).to(torch.int32)
    return SampleTables(
        seen=seen.to(torch.int16), edit_ids=ids.int(), edit_values=values, masks=(words[0] & words[1]) | 1
    )


def adjusted_columns(num_rows: int, num_edits: int = 12) -> dict[str, Any]:
    """Penalties, forbidden tokens, biases, and stop tokens before `min_tokens`, each for some of the rows."""
    rows = np.arange(num_rows)
    return {
        "has_penalties": rows % 2,
        "is_restricted": rows % 5 < 2,
        "repetition": np.where(rows % 2, 1.3, 1.0),
        "presence": np.where(rows % 4 == 1, 0.7, 0.0),
        "frequency": np.where(rows % 4 == 3, -0.4, 0.0),
        "num_edits": np.where(rows % 3 == 0, num_edits, 0),
        "num_biases": np.where(rows % 6 == 0, 5, 0),
        "first_free_stop": np.where(rows % 5 < 3, 1000, 0),
        "mask": np.where(rows % 7 < 3, 1 + rows, 0),
    }


def to(tables_: SampleTables, device: torch.device) -> SampleTables:
    """Copies of the tables on a device, because a draw writes to them."""
    return SampleTables(
        seen=tables_.seen.to(device, copy=True),
        edit_ids=tables_.edit_ids.to(device),
        edit_values=tables_.edit_values.to(device),
        masks=tables_.masks.to(device),
    )


def assert_distribution(token_ids: Tensor, logits: Tensor, *, top_k: int, top_p: float) -> None:
    """A chi-square test of draws at temperature 1 from logits [V]; correct draws fail once in 10,000 times."""
    num_draws, vocab_size = len(token_ids), len(logits)
    probabilities, order = logits.double().softmax(-1).sort(descending=True)
    kept = probabilities[:top_k]
    kept = kept[kept.cumsum(0) - kept < top_p * kept.sum()]
    expected = torch.zeros(vocab_size, dtype=torch.float64, device=logits.device)
    expected[order[: len(kept)]] = kept / kept.sum() * num_draws
    counts = torch.bincount(token_ids, minlength=vocab_size)
    assert not counts[expected == 0].any()
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum().item()
    # The quantile, by the approximation of Wilson and Hilferty.
    degrees = len(kept) - 1
    spread = 2 / (9 * degrees)
    assert chi_square < degrees * (1 - spread + 3.72 * spread**0.5) ** 3
