"""Products with decode attention inside, on a whole card: at which rate, and on how many multiprocessors (SMs).

What carries what is `executor/inside.py`'s, and the kernels are `gluon_inside.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanoflow.graph.operation import AttentionDims, LinearDims
from nanoflow.kernels.dispatch import has_gluon
from nanoflow.kernels.launch import Launch

if TYPE_CHECKING:
    from nanoflow.kernels.gluon_inside import Taken


def steps_of(share: float) -> int:
    """K-steps of a product to a block of keys, where products have this share of the steps."""
    return max(round(share / (1.0 - share)), 1)


def share_of(steps: int) -> float:
    """The products' share of the steps, with so many k-steps to a block of keys."""
    return steps / (steps + 1)


def can_carry(device: torch.device, dtype: torch.dtype, dims: AttentionDims) -> bool:
    """Whether decode attention of these heads runs inside products on this device."""
    if not has_gluon():
        return False
    from nanoflow.kernels import gluon_inside

    return gluon_inside.can_carry(device, dtype, dims)


@dataclass(frozen=True, slots=True, kw_only=True)
class GluonCarrier:
    """`executor.inside.Carrier` for a Hopper card.

    Attributes:
        num_sms: Of the card.
        steps: K-steps to a block of keys.
    """

    num_sms: int
    steps: int

    def rounds(self, dims: LinearDims, num_tokens: int) -> int:
        """Blocks of keys that a product of so many tokens carries in each warpgroup of its busiest program."""
        from nanoflow.kernels import gluon_inside

        return gluon_inside.rounds_of(num_tokens, dims.out_features, dims.in_features, self.num_sms, self.steps)

    def take(self, attention: Launch, max_runs: int) -> Taken:
        """See `gluon_inside.take`."""
        from nanoflow.kernels import gluon_inside

        return gluon_inside.take(attention, max_runs, self.num_sms, self.steps)

    def run(self, product: Launch, taken: Taken, until: int) -> None:
        """See `gluon_inside.carry`."""
        from nanoflow.kernels import gluon_inside

        gluon_inside.carry(product, taken, until, self.num_sms)

    def finish(self, taken: Taken) -> None:
        """See `gluon_inside.finish`."""
        from nanoflow.kernels import gluon_inside

        gluon_inside.finish(taken, self.num_sms)
