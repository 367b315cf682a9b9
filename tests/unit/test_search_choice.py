"""What a search settles on: never a plan that is predicted to be slower than the sequential one, or hardly faster."""

from __future__ import annotations

import pytest

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.search.search import Attempt, Search
from tests.unit.test_simulate import GRAPH, SHAPE, profile


@pytest.mark.parametrize(
    ("makespans_s", "chosen"),
    [([1.2, 1.1], None), ([1.0], None), ([0.996], None), ([0.994], 0), ([0.9, 0.8, 1.3], 1), ([], None)],
)
def test_the_fastest_attempt_must_win_against_the_sequential_plan(makespans_s: list[float], chosen: int | None) -> None:
    attempts = [
        Attempt(
            plan=nanobatch_plan(GRAPH, 512, [128 * (1 + place)]),
            period_s=makespan_s,
            least_period_s=makespan_s,
            makespan_s=makespan_s,
        )
        for place, makespan_s in enumerate(makespans_s)
    ]
    found = Search(profile(), SHAPE)._choose(GRAPH, 1.0, [], attempts)
    if chosen is None:
        assert found.plan.name == "sequential" and found.makespan_s == 1.0
    else:
        assert found.plan == attempts[chosen].plan


def test_a_batch_is_cut_anywhere_but_near_its_ends() -> None:
    """At multiples of a tile; a quick search cuts in the middle alone."""
    shape = BatchShape(num_tokens=2048)
    assert Search(profile(), shape)._boundaries() == list(range(512, 1537, 128))
    assert Search(profile(), shape, is_quick=True)._boundaries() == [1024]
