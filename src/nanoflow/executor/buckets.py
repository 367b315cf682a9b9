"""Sizes that batches are padded to, so that few CUDA graphs serve all batches.

A graph is recorded for one size: tokens, places for decodes, parts of prompts. Measured on one H200 with Llama-3-8B,
padding costs little: room for 16 parts of prompts instead of 4 takes less than 1 % of an iteration, room for decodes
that are not there nothing that can be seen up to some hundreds. Tokens cost more, so their steps are small. What is
recorded when is `captured.py`'s to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow.executor.inputs import BatchSize
from nanoflow.plan.plan import PipelinePlan

# Classes of room, in batches with prompts; the limits are the last class of each.
_DECODES = (256,)
_PREFILLS = (16, 128)
# While a larger batch runs there is time to record the graph of the next: an iteration of Llama-3-8B takes the device
# 75 ms here, and recording the host 50. Smaller models are near the border (Llama-3.2-1B: 15 and 15).
_LARGE_TOKENS = 2048
# A batch of fewer tokens has room for so few prompts that many of them in it are rare.
_MANY_PREFILLS_FROM = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Sizes of one engine.

    Attributes:
        max_tokens: The token budget.
        max_requests: Most requests that run at once.
    """

    max_tokens: int
    max_requests: int

    def max_decodes(self, plan: PipelinePlan) -> int:
        """Places from the first on among which decodes may be: where a plan cuts the batch, they are dealt over it."""
        return plan.num_tokens if plan.cuts else self.max_requests

    def max_prefills(self, plan: PipelinePlan) -> int:
        """Parts of prompts, and gaps between them: a cut may end a part, and a gap follows it."""
        return self.max_requests + 2 * len(plan.cuts)

    def size_for(self, size: BatchSize, plan: PipelinePlan) -> BatchSize:
        """The smallest bucket of a plan with room for a batch of this size.

        Tokens go up in steps small beside what a product costs: powers of two to 16, then eighths of the next power of
        two, 128 at most. Batches of decodes alone have as many places for decodes as tokens. The others come in a few
        classes.
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
        """Sizes of a plan without cuts that serving meets, the most common first: decodes alone, then with prompts.

        Left out are batches so large that recording the first of their size is about hidden.
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
        """All sizes in tokens up to that of `most`, the smallest first."""
        return sorted(
            {min(_round_tokens(count), self.max_tokens) for count in range(1, min(most, self.max_tokens) + 1)}
        )


def _class_of(count: int, classes: tuple[int, ...], most: int) -> int:
    """The first class with room for so many; `most` if there is none."""
    return next((room for room in classes if count <= room < most), most)


def _round_tokens(count: int) -> int:
    """At least `count`: a power of two to 16, from there a multiple of an eighth of the next one, or of 128."""
    power = 1
    while power < count:
        power *= 2
    step = min(max(power // 8, 1), 128)
    return power if power <= 16 else -(-count // step) * step
