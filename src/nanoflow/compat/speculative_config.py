"""vLLM's `speculative_config`: a mapping, or its JSON, as the text that the option `speculative` takes.

What that text means is known in `nanoflow/speculation.py` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow.compat.entries import read_text
from nanoflow.parameters import did_you_mean, shown

_NUMBERS = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
# What else vLLM takes there for this method, of no effect here: drafts stop by themselves where batches are large.
_IGNORED = (
    "disable_by_batch_size",
    "speculative_disable_by_batch_size",
    "disable_padded_drafter_batch",
    "enforce_eager",
)
_METHODS = ("ngram", "[ngram]")


def ngram_of(value: Any) -> str | None:
    """`ngram:TOKENS[:LONGEST[:SHORTEST]]` for such a mapping; None for an empty one.

    Raises:
        ValueError: It asks for another method, leaves out the number of tokens, or has what there is not.
    """
    config = read_text(value) if isinstance(value, str) else value
    if config is None or config == {}:
        return None
    if not isinstance(config, Mapping):
        raise ValueError(
            f'must be a mapping, as {{"method": "ngram", "num_speculative_tokens": 4}}, got {shown(value)}'
        )
    given = {name: entry for name, entry in config.items() if entry is not None}
    method = given.pop("method", given.get("model"))
    if method not in _METHODS:
        raise ValueError(f"method must be ngram, got {shown(method)}: there are no draft models")
    if given.pop("model", method) not in _METHODS:
        raise ValueError("prompt look-up takes no model: leave it out")
    for name in given:
        if name not in (*_NUMBERS, *_IGNORED):
            raise ValueError(f"{shown(name)} is not possible with ngram{did_you_mean(str(name), _NUMBERS) or ''}")
    numbers = {name: _whole(name, given[name]) for name in _NUMBERS if name in given}
    if "num_speculative_tokens" not in numbers:
        raise ValueError("num_speculative_tokens is missing: how many tokens a draft has, as 4")
    return ":".join(["ngram", *map(str, _lengths(**numbers))])


def _lengths(
    num_speculative_tokens: int, prompt_lookup_max: int | None = None, prompt_lookup_min: int | None = None
) -> list[int]:
    """The numbers of the option; of two lengths to look for one that is alone stands for both, as in vLLM."""
    longest = prompt_lookup_min if prompt_lookup_max is None else prompt_lookup_max
    shortest = prompt_lookup_max if prompt_lookup_min is None else prompt_lookup_min
    return [number for number in (num_speculative_tokens, longest, shortest) if number is not None]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    return value
