"""What copies of KV pages to host memory and back take, and what they take from the iteration that runs meanwhile.

Two rates: that of the link, as the profile measured it, and that at which the device reads its own memory, from the
profile's decode attentions. `kvcache/` and `scheduler/lower_tiers.py` decide what is copied.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import AttentionDims, OpKind
from nanoflow.hardware import GPUS
from nanoflow.profile.table import Profile

_DTYPE_BYTES = 2
# Where nothing is known of a device: PCIe of the fourth generation, and memory of a small GPU.
_LINK_BYTES_PER_S, _MEMORY_BYTES_PER_S = 22e9, 300e9


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """Bytes/s between a GPU and host memory, in one direction, and of the GPU's own memory."""

    link_bytes_per_s: float
    memory_bytes_per_s: float

    def slowdown_s(self, num_bytes: float) -> float:
        """Seconds by which copies of so many bytes lengthen an iteration beside them: they use its memory too."""
        return num_bytes / self.memory_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """The copies beside every iteration: each token's keys and values are saved once, some are loaded.

    Attributes:
        rates: Of the link and of memory.
        token_bytes: Of one token on one GPU, over all layers.
    """

    rates: LinkRates
    token_bytes: int

    def lane_s(self, num_tokens: int, num_loaded: int = 0) -> float:
        """Seconds of the copy lane: so many tokens are saved, and so many loaded at the same time."""
        return max(num_tokens, num_loaded) * self.token_bytes / self.rates.link_bytes_per_s

    def beside(self, compute_s: float, num_tokens: int, num_loaded: int = 0) -> float:
        """Seconds of an iteration of so many tokens with its copies: those of the longer of both."""
        slowdown_s = self.rates.slowdown_s((num_tokens + num_loaded) * self.token_bytes)
        return max(compute_s + slowdown_s, self.lane_s(num_tokens, num_loaded))


NO_COPIES = Copies(rates=LinkRates(link_bytes_per_s=math.inf, memory_bytes_per_s=math.inf), token_bytes=0)
"""Nothing is below the KV cache."""


def copies_of(profile: Profile, graph: OpGraph, *, host_gib: float) -> Copies:
    """What is copied with so much host memory below the KV cache; nothing if there is none."""
    if not host_gib:
        return NO_COPIES
    token_bytes = graph.kv_bytes_per_token(_DTYPE_BYTES)
    return Copies(rates=link_rates(profile, graph), token_bytes=token_bytes)


def link_rates(profile: Profile, graph: OpGraph) -> LinkRates:
    """The rates of a profile's device.

    Args:
        profile: Older ones do not have the link; then it is the estimate for this GPU in `hardware.py`.
        graph: The profiled model as one GPU sees it.
    """
    spec = _spec_key(profile.setup.gpu)
    estimate = GPUS[spec].host_link_bytes_per_s.value if spec else _LINK_BYTES_PER_S
    rates = [
        op.dims.cached_bytes(_DTYPE_BYTES) * point.num_tokens * point.context / point.time_s
        for op in graph.layer_operations
        if op.kind is OpKind.DECODE_ATTENTION and isinstance(op.dims, AttentionDims)
        for point in profile.points
        if point.operation == op.key and point.is_on_whole_device
    ]
    return LinkRates(
        link_bytes_per_s=profile.host_link_bytes_per_s or estimate,
        memory_bytes_per_s=max(rates, default=_MEMORY_BYTES_PER_S),
    )


def _spec_key(title: str) -> str | None:
    """The longest known name with which that of a GPU begins, its maker aside; None if there is none."""
    written = _plain(title).removeprefix("nvidia")
    return max((name for name in GPUS if written.startswith(_plain(name))), key=len, default=None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
