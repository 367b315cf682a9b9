"""Power as the fourth resource: what an operation draws beyond the static power, and what the limit leaves for it.

A power controller works over milliseconds, longer than a layer takes, so what counts is the energy of a layer:
`makespan x (limit - static) >= sum of dynamic energy`. Overlapping pays only as far as it lowers that sum.
"""

from __future__ import annotations

from nanoflow.profile.table import Cost, Setup


def static_power_w(setup: Setup) -> float:
    """Drawn whatever runs; 0 if unknown, and then it is part of every energy."""
    return setup.static_power_w or 0.0


def dynamic_power_w(setup: Setup) -> float | None:
    """What the limit leaves for work on one GPU; None if the limit is not known."""
    return None if setup.power_limit_w is None else setup.power_limit_w - static_power_w(setup)


def dynamic_energy_j(cost: Cost, setup: Setup) -> float | None:
    """Energy of an operation beyond the static power; None if unknown.

    No more than the limit allows in its time: counters are coarse, and alone it was measured at that limit.
    """
    if cost.energy_j is None:
        return None
    energy_j = max(cost.energy_j - static_power_w(setup) * cost.time_s, 0.0)
    limit_w = dynamic_power_w(setup)
    return energy_j if limit_w is None else min(energy_j, limit_w * cost.time_s)
