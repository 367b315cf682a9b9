"""Sizes that batches are padded to, so that few CUDA graphs serve all batches.

A graph is recorded for one size: tokens, places for decodes, and parts of prompts. Padding costs little, measured on
one H200 with Llama-3-8B: room for 16 parts of prompts instead of 4 takes less than 1 % of an iteration, and room for
some hundred absent decodes takes no time that can be measured. Tokens cost more, so their steps are small.
`captured.py` decides what is recorded when.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow.executor.inputs import BatchSize
from nanoflow.plan.plan import PipelinePlan

# Classes of room in batches with prompts; the last class of each is the limit.
_DECODES = (256,)
_PREFILLS = (16, 128)
# While a larger batch runs there is time to record the graph of the next: an iteration of Llama-3-8B takes the device
# 75 ms here, and recording the host 50. Smaller models are near the border (Llama-3.2-1B: 15 and 15).
_LARGE_TOKENS = 2048
# Batches of fewer tokens rarely have many parts of prompts.
_MANY_PREFILLS_FROM = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Sizes of one engine.

    Attributes:
        max_tokens: The token budget.
        max_requests: Maximum number of running requests.
    """

    max_tokens: int
    max_requests: int

    def max_decodes(self, plan: PipelinePlan) -> int:
        """Places, from the first on, for decodes. A plan that cuts the batch spreads decodes over all of it."""
        return plan.num_tokens if plan.cuts else self.max_requests

    def max_prefills(self, plan: PipelinePlan) -> int:
        """Maximum number of parts of prompts and gaps between them: each cut may end a part and leave a gap."""
        return self.max_requests + 2 * len(plan.cuts)

    def size_for(self, size: BatchSize, plan: PipelinePlan) -> BatchSize:
        """The smallest bucket of a plan with room for a batch of this size.

        Steps of tokens are small compared with the cost of a product: powers of two up to 16, then eighths of the next
        power of two, at most 128. In batches of decodes alone there are as many places for decodes as tokens. Other
        batches have a few classes of room.
        """
        num_tokens = min(_round_tokens(size.num_tokens), plan.num_tokens, self.max_tokens)
        max_decodes = min(self.max_decodes(plan), num_tokens)
        if size.num_prefills == 0:
            return BatchSize(num_tokens=num_tokens, num_decodes=max_decodes, num_prefills=0)
        decode_classes = () if plan.cuts else _DECODES
        return BatchSize(
            num_tokens=num_tokens,
            num_decodes=_class_of(size.num_decodes, decode_classes, max_decodes),
            num_prefills=_class_of(size.num_prefills, _PREFILLS, self.max_prefills(plan)),
        )

    def common(self, plan: PipelinePlan) -> Iterator[BatchSize]:
        """Sizes of a plan without cuts that occur in serving, the most common first: decodes alone, then with prompts.

        Very large batches are left out: recording their graph is hidden behind the iteration before.
        """
        for num_tokens in self._token_sizes(min(self.max_requests, plan.num_tokens)):
            yield self.size_for(BatchSize(num_tokens=num_tokens, num_decodes=num_tokens, num_prefills=0), plan)
        seen = set()
        for num_prefills in _PREFILLS:
            for num_decodes in (*_DECODES, self.max_requests):
                for num_tokens in self._token_sizes(min(_LARGE_TOKENS, plan.num_tokens)):
                    wanted = BatchSize(
                        num_tokens=num_tokens,
                        num_decodes=min(num_decodes, num_tokens),
                        num_prefills=min(num_prefills, self.max_requests),
                    )
                    size = self.size_for(wanted, plan)
                    is_rare = num_prefills > _PREFILLS[0] and num_tokens <= _MANY_PREFILLS_FROM
                    if not is_rare and size not in seen:
                        seen.add(size)
                        yield size

    def _token_sizes(self, most: int) -> list[int]:
        """All sizes in tokens up to that of `most`, in ascending order."""
        return sorted(
            {min(_round_tokens(count), self.max_tokens) for count in range(1, min(most, self.max_tokens) + 1)}
        )


def _class_of(count: int, classes: tuple[int, ...], most: int) -> int:
    """The smallest class with room for `count`; `most` if there is none."""
    return next((room for room in classes if count <= room < most), most)


def _round_tokens(count: int) -> int:
    """At least `count`: a power of two up to 16, above that a multiple of an eighth of the next power, or of 128."""
    power = 1
    while power < count:
        power *= 2
    step = min(max(power // 8, 1), 128)
    return power if power <= 16 else -(-count // step) * step
