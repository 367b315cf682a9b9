"""What a search settles on: never a plan that is predicted to be slower than the sequential one, or hardly faster."""

from __future__ import annotations

import pytest

from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.search.cuts import boundaries
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


@pytest.mark.parametrize(
    ("num_tokens", "places"), [(2048, [1024, 896, 1152]), (768, [384, 256, 512]), (256, [128]), (255, [128]), (128, [])]
)
def test_a_batch_is_cut_near_its_middle_at_multiples_of_a_tile(num_tokens: int, places: list[int]) -> None:
    assert boundaries(num_tokens) == places
