"""What the scheduler's rule leaves open, as functions that it is given: whom to expect how long, and whom to send back.

`default_policies` is what an engine uses. The others are there to be compared with it, by `nanoflow simulate
--policies` and after INFERMAX (https://arxiv.org/abs/2411.07447). None of them changes which tokens a request gets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanoflow.batch import Int64
from nanoflow.scheduler.progress import Lengths, Progress
from nanoflow.scheduler.reuse import Candidate, Queueing
from nanoflow.scheduler.rows import RowTable
from nanoflow.scheduler.tiers import NOTHING, Below, Tiers
from nanoflow.scheduler.waiting import WaitingRequest

Expect = Callable[[Lengths, Progress], Int64]
"""Tokens that each request is assumed to generate from now on, int64 [N], each at least 1."""

Victim = Callable[[RowTable, Lengths], int]
"""The row whose request is sent back to the queue when pages have run out."""


def expect_learnt(lengths: Lengths, progress: Progress) -> Int64:
    """What was learnt from requests that have ended: the predicted peak of pages fits."""
    return lengths.counted_remaining(progress)


def expect_held(lengths: Lengths, progress: Progress) -> Int64:
    """The same, counting that those who end give back the pages of their prompts too."""
    return lengths.held_remaining(progress)


def expect_most(lengths: Lengths, progress: Progress) -> Int64:
    """As many as each may generate: nobody is ever sent back."""
    del lengths
    return np.maximum(progress.max_remaining, 1)


def expect_next(lengths: Lengths, progress: Progress) -> Int64:
    """The next token alone: everybody runs whose known tokens fit, and who turns out to be too many is sent back."""
    del lengths
    return np.ones_like(progress.num_tokens)


def newest(rows: RowTable, lengths: Lengths) -> int:
    """Of the least urgent requests the one that was let in last."""
    del lengths
    return int(rows.order[-1])


def longest_remaining(rows: RowTable, lengths: Lengths) -> int:
    """Of the least urgent requests the one that is expected to generate most.

    It is not the oldest of several that run, so that one always goes on.
    """
    ranks = rows.rank[rows.order]
    first = max(min(1, rows.num_running - 1), int(np.searchsorted(ranks, ranks[-1])))
    remaining = lengths.counted_remaining(rows.progress())
    return int(rows.order[first + np.argmax(remaining[first:])])


def loads_for_new(tiers: Tiers, waiting: WaitingRequest, keys: Sequence[bytes], num_cached: int) -> Below:
    """Who has been sent back computes again what the device has no more."""
    return NOTHING if waiting.is_preempted else tiers.find(keys, num_cached)


def up_to_first_load(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Nobody overtakes one for whom something is to be loaded."""
    return list(itertools.takewhile(lambda each: not each.num_loadable, candidates))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """One choice of each kind.

    Attributes:
        expect: How long requests are assumed to run when others ask to join them.
        victim: Who is sent back when pages have run out.
        queueing: Who waits for pages of lower tiers, and who overtakes those that do.
    """

    expect: Expect = expect_learnt
    victim: Victim = newest
    queueing: Queueing = field(default_factory=Queueing)


def default_policies(tiers: Tiers) -> Policies:
    """What an engine does.

    With tiers below the device a request that is sent back loses little, so more are let in: when others end they will
    give back the pages of their prompts too. Without tiers it would have to be computed again.
    """
    return Policies(expect=expect_held if tiers.is_on else expect_learnt)
