"""How far requests are: the numbers behind admission, of running and of waiting ones alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanoflow.batch import Bool, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far N requests are, in tokens.

    Attributes:
        num_tokens: int64 [N], prompt and generated.
        num_generated: int64 [N].
        max_remaining: int64 [N], tokens that may still be generated.
        is_exact: bool [N], all of them will be (end of sequence is ignored).
        is_background: bool [N], they are background requests.
    """

    num_tokens: Int64
    num_generated: Int64
    max_remaining: Int64
    is_exact: Bool
    is_background: Bool

    def __add__(self, other: Progress) -> Progress:
        """These requests, then those."""
        return Progress(
            num_tokens=np.concatenate((self.num_tokens, other.num_tokens)),
            num_generated=np.concatenate((self.num_generated, other.num_generated)),
            max_remaining=np.concatenate((self.max_remaining, other.max_remaining)),
            is_exact=np.concatenate((self.is_exact, other.is_exact)),
            is_background=np.concatenate((self.is_background, other.is_background)),
        )


class Lengths(Protocol):
    """What has been learnt of output lengths; `lengths.py` and `class_lengths.py` have it."""

    def counted_remaining(self, progress: Progress) -> Int64:
        """Tokens that each request is assumed to generate from now on, int64 [N]."""

    def held_remaining(self, progress: Progress) -> Int64:
        """The same, but so that a request's prompt leaves with it too."""
