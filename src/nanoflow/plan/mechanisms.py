"""Mechanisms: the ways in which lanes share a device, each described once, as data.

A description says what a mechanism asks of kernels, how its lanes open, what a profile measures of it, and what a
prediction rests on. Whoever acts on it reads these fields: the executor opens lanes and picks kernels by them, the
profiler chooses what to measure, the tables of a profile what to look up, the search which plans to try. So a further
mechanism is one more entry here, and a function that opens its lanes in `executor/lanes.py`.

In bfloat16 on one card `STREAM` and `PARTITION` lose against the sequential plan. They stay for what does not compete
for the multiprocessors (SMs) of a card: collectives and copies.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Opening(enum.Enum):
    """What a lane is when a plan runs."""

    CURRENT_STREAM = enum.auto()
    """The stream that is current when a forward pass begins; nothing has to be opened."""
    OWN_STREAM = enum.auto()
    """A stream of its own. The device decides which of the streams' kernels run."""
    OWN_SMS = enum.auto()
    """A stream on SMs of its own, which no other lane has."""
    SHARED_SMS = enum.auto()
    """One of two streams on all SMs; the kernels of both fit on an SM together."""
    ONE_STREAM = enum.auto()
    """Two lanes are one stream: the kernels of one lane do the work of the other as well."""


class KernelNeed(enum.Enum):
    """Which kernels a lane can run."""

    ANY = enum.auto()
    FOR_SMS = enum.auto()
    """Kernels with as many programs as the lane has SMs."""
    SMALL = enum.auto()
    """Kernels that leave room on each SM for a kernel of the other lane."""
    CARRYING = enum.auto()
    """Products that can compute a part of decode attention (that carry it)."""


class Measured(enum.Enum):
    """What a profile has of a mechanism, from which its plans are predicted."""

    NOTHING = enum.auto()
    """Operations have the whole device, so their times alone are enough."""
    PAIRS = enum.auto()
    """Two operations side by side on two lanes (`profile/interference.py`)."""
    CARRIED = enum.auto()
    """Products together with the attention that they carry (`profile/carry.py`)."""


class ShareOrigin(enum.Enum):
    """Where the shares of measured pairs come from."""

    ASKED_FOR = enum.auto()
    """Several shares can be asked for, and each is measured."""
    HALF = enum.auto()
    """There is no choice: each of two lanes counts as half of the device."""
    RESULT = enum.auto()
    """No share can be asked for; the part of its speed that the first operation keeps stands for its share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What there is to know of a mechanism.

    Attributes:
        opening: What its lanes are.
        kernels: What they run.
        measured: What a profile has of it.
        share_origin: Of its pairs. The search divides the device only into shares that can be had, so not into those
            that are a result.
        is_by_size: Pairs are measured with products of several sizes, since few tokens leave more of the device to the
            other lane. Else they have one size.
        keeps_share: An operation has its share even while nothing runs beside it, so it is also measured alone on it.
        margin: Part by which a plan must be predicted to win before it is used without a trial on the card. It is how
            far off such predictions have been (docs/log/2026-11-27-same-batches.md).
    """

    opening: Opening
    kernels: KernelNeed = KernelNeed.ANY
    measured: Measured = Measured.NOTHING
    share_origin: ShareOrigin = ShareOrigin.ASKED_FOR
    is_by_size: bool = False
    keeps_share: bool = False
    margin: float = 0.0


# Predictions that are put together from pairs of operations were up to 7 % too good. Products that carry attention are
# measured as they run, in one kernel; those predictions were up to 4 % off.
_MARGIN_OF_PAIRS, _MARGIN_OF_CARRIED = 0.08, 0.03


class Mechanism(enum.StrEnum):
    """How lanes share the device; the values are the names in plans, profiles and options."""

    WHOLE = "whole"
    STREAM = "stream"
    PARTITION = "partition"
    BESIDE = "beside"
    INSIDE = "inside"

    @property
    def traits(self) -> Traits:
        """Its description."""
        return _TRAITS[self]


_TRAITS: Mapping[Mechanism, Traits] = {
    Mechanism.WHOLE: Traits(opening=Opening.CURRENT_STREAM),
    Mechanism.STREAM: Traits(
        opening=Opening.OWN_STREAM,
        measured=Measured.PAIRS,
        share_origin=ShareOrigin.RESULT,
        margin=_MARGIN_OF_PAIRS,
    ),
    Mechanism.PARTITION: Traits(
        opening=Opening.OWN_SMS,
        kernels=KernelNeed.FOR_SMS,
        measured=Measured.PAIRS,
        keeps_share=True,
        margin=_MARGIN_OF_PAIRS,
    ),
    Mechanism.BESIDE: Traits(
        opening=Opening.SHARED_SMS,
        kernels=KernelNeed.SMALL,
        measured=Measured.PAIRS,
        share_origin=ShareOrigin.HALF,
        is_by_size=True,
        margin=_MARGIN_OF_PAIRS,
    ),
    Mechanism.INSIDE: Traits(
        opening=Opening.ONE_STREAM,
        kernels=KernelNeed.CARRYING,
        measured=Measured.CARRIED,
        is_by_size=True,
        margin=_MARGIN_OF_CARRIED,
    ),
}
