"""The order of requests that makes a batch fast: shared prefixes together, prompts beside completions.

A prompt is bound by compute, a completion by the memory that its keys are read from. An iteration is fast if it has
both. The order is BlendServe's ("BlendServe: Optimizing Offline Inference for Auto-regressive Large Models with
Resource-aware Batching", 2024): requests that begin alike form groups, groups are sorted by how much more of the one
resource they need than of the other, and are taken from both ends of that list, so that at any time about the same part
of all compute and of all memory traffic has been handed out. Groups stay together, so a prefix is computed once.

Nothing here knows files or models: lengths, prefixes and two costs come from the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.workload import Lengths

# Requests that begin with so many equal elements (bytes of text, or tokens) are a group.
MIN_SHARED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCost:
    """What a request costs, in seconds of each resource.

    Attributes:
        token_s: Time of compute for a token, of a prompt or of a completion: FLOPs / FLOP/s.
        key_s: Time of memory to read the keys and values of one token once: bytes / (bytes/s).
    """

    token_s: float
    key_s: float

    def compute_s(self, length: Lengths) -> float:
        """Seconds of compute: every token passes the weights."""
        return self.token_s * (length.num_prompt_tokens - length.num_computed + length.num_output_tokens)

    def memory_s(self, length: Lengths) -> float:
        """Seconds of memory: every token of the completion reads the keys of all tokens before it."""
        num_output = length.num_output_tokens
        return self.key_s * num_output * (length.num_prompt_tokens + num_output / 2)


@dataclass(slots=True)
class _Group:
    """Requests that begin alike, and what they cost together."""

    places: list[int]
    compute_s: float
    memory_s: float

    @property
    def density(self) -> float:
        """Compute a second of memory."""
        return self.compute_s / max(self.memory_s, 1e-12)


def order_requests(
    lengths: Sequence[Lengths],
    prefixes: Sequence[Any],
    cost: RequestCost,
    *,
    min_shared: int = MIN_SHARED,
) -> list[int]:
    """The order in which requests should be sent.

    Args:
        lengths: Tokens of each prompt and, as far as known, of its completion.
        prefixes: The beginning of each prompt: texts, bytes or token ids, all of one kind.
        cost: What they cost.
        min_shared: Elements that prompts of one group have in common at least.

    Returns:
        Every index once.
    """
    groups = _groups(lengths, prefixes, cost, min_shared)
    groups.sort(key=lambda group: (-group.density, group.places[0]))
    places = [place for group in groups for place in group.places]
    compute_s = [cost.compute_s(lengths[place]) for place in places]
    memory_s = [cost.memory_s(lengths[place]) for place in places]
    # Shares of the whole, so that both sums end at 1.
    whole_compute_s, whole_memory_s = max(sum(compute_s), 1e-12), max(sum(memory_s), 1e-12)
    order = list[int]()
    compute = memory = 0.0
    left, right = 0, len(places) - 1
    while left <= right:
        # The left end needs more compute, the right end more memory: take what is behind.
        if compute <= memory:
            at, left = left, left + 1
        else:
            at, right = right, right - 1
        order.append(places[at])
        compute += compute_s[at] / whole_compute_s
        memory += memory_s[at] / whole_memory_s
    return order


def _groups(lengths: Sequence[Lengths], prefixes: Sequence[Any], cost: RequestCost, min_shared: int) -> list[_Group]:
    """Requests whose neighbour in the order of prefixes begins alike, each group by density."""
    groups = list[_Group]()
    last: Any = ()
    for place in sorted(range(len(prefixes)), key=lambda place: prefixes[place]):
        prefix, length = prefixes[place], lengths[place]
        if not groups or len(prefix) < min_shared or prefix[:min_shared] != last[:min_shared]:
            groups.append(_Group([], 0.0, 0.0))
        group = groups[-1]
        group.places.append(place)
        group.compute_s += cost.compute_s(length)
        group.memory_s += cost.memory_s(length)
        last = prefix
    for group in groups:
        group.places.sort(key=lambda place: -cost.compute_s(lengths[place]) / max(cost.memory_s(lengths[place]), 1e-12))
    return groups
