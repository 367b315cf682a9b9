"""Read the prompts and parameters of a call, which may have one or several of either.

`prompts.py` says what a single prompt may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from nanoflow.parameters import shown
from nanoflow.priorities import PRIORITY, Priority
from nanoflow.request import RequestError, SamplingParams


def is_one_prompt(prompts: Any) -> bool:
    """True for one prompt, false for a list of them; RequestError if it is neither."""
    if isinstance(prompts, str | Mapping):
        return True
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are a prompt or a list of prompts, got {shown(prompts)}")
    return len(prompts) > 0 and isinstance(prompts[0], Integral)


def inputs_of(prompts: Any, prompt_token_ids: Any) -> list[Any]:
    """The prompts of a call, one by one.

    Args:
        prompts: One prompt or a list of them; None if only token ids are given.
        prompt_token_ids: Token ids of one prompt or of each, as in older versions of vLLM; None if not given.

    Raises:
        RequestError: There is no prompt, or the numbers of texts and of lists of token ids differ.
    """
    if prompt_token_ids is None:
        if prompts is None:
            raise RequestError("generate needs a prompt or a list of prompts")
        return [prompts] if is_one_prompt(prompts) else list(prompts)
    all_ids = [prompt_token_ids] if is_one_prompt(prompt_token_ids) else list(prompt_token_ids)
    if prompts is None:
        return all_ids
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(all_ids):
        raise RequestError(f"there are {len(texts)} prompts and {len(all_ids)} prompt_token_ids")
    return [{"prompt": text, "prompt_token_ids": ids} for text, ids in zip(texts, all_ids, strict=True)]


def params_of_each(
    sampling_params: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> Sequence[SamplingParams]:
    """The parameters of each prompt; RequestError if there is a list of another length."""
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, Sequence):
        raise RequestError(f"sampling_params are SamplingParams or a list of them, got {shown(sampling_params)}")
    if len(sampling_params) != num_prompts:
        raise RequestError(f"there are {len(sampling_params)} sampling_params for {num_prompts} prompts")
    return sampling_params


def priority_of_each(priority: Priority | Sequence[Priority] | None, num_prompts: int) -> Sequence[Priority | None]:
    """The priority of each prompt, None for its own; RequestError if one is invalid or their number is another."""
    if priority is None:
        return [None] * num_prompts
    if isinstance(priority, str) or not isinstance(priority, Sequence):
        return [PRIORITY.read("priority", priority)] * num_prompts
    if len(priority) != num_prompts:
        raise RequestError(f"there are {len(priority)} priorities for {num_prompts} prompts", param="priority")
    return [PRIORITY.read("priority", one) for one in priority]
