"""vLLM's `speculative_config`, a mapping or its JSON, as the text of the option `speculative`.

`nanoflow/speculation.py` reads that text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow.compat.entries import Foreign, Table, options, read_text, switches
from nanoflow.parameters import did_you_mean, shown

_NUMBERS = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
_METHODS = ("ngram", "[ngram]")
_NO_DRAFT_MODEL = "there is no draft model"

SPECULATIVE = Table.of(
    "vLLM's speculative_config",
    options(
        "there are no drafts in iterations in which they do not pay, whatever the batch size: leave it out",
        *("disable_by_batch_size", "speculative_disable_by_batch_size"),
    ),
    switches(_NO_DRAFT_MODEL, "enforce_eager", "disable_padded_drafter_batch", takes=(True, False)),
    switches(_NO_DRAFT_MODEL, "parallel_drafting"),
    options(_NO_DRAFT_MODEL, "draft_tensor_parallel_size", takes=(1,)),
    options(_NO_DRAFT_MODEL, "quantization", "max_model_len", "revision", "code_revision"),
    (
        Foreign(
            name="rejection_sample_method",
            takes=("strict",),
            reason="a drafted token counts only if the model would have drawn it",
        ),
    ),
)
"""Keys of the mapping that are not supported, with the values at which they are accepted."""


def ngram_of(value: Any) -> str | None:
    """`ngram:TOKENS[:LONGEST[:SHORTEST]]` for such a mapping; None for an empty one.

    Raises:
        ValueError: The mapping asks for another method, has no number of tokens, or has a key that is not supported
            or not supported with its value.
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
    for name, entry in given.items():
        if name not in _NUMBERS:
            _check_foreign(name, entry)
    numbers = {name: _whole(name, given[name]) for name in _NUMBERS if name in given}
    if "num_speculative_tokens" not in numbers:
        raise ValueError("num_speculative_tokens is missing: how many tokens a draft has, as 4")
    return ":".join(["ngram", *map(str, _lengths(**numbers))])


def _check_foreign(name: Any, value: Any) -> None:
    """Refuse a key that is not ours, unless its value asks for what is done anyway."""
    foreign = SPECULATIVE.entries.get(name) if isinstance(name, str) else None
    if not isinstance(foreign, Foreign):
        raise ValueError(f"{shown(name)} is not possible with ngram{did_you_mean(str(name), _NUMBERS) or ''}")
    if not foreign.changes_nothing(value):
        raise ValueError(foreign.refusal(value))


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
