"""What a search settles on: never a plan that is predicted to be slower than the sequential one, or hardly faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.plan.book import load_book
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.profile.interference import Interference
from nanoflow.profile.table import CostTable, Profile
from nanoflow.search.allocate import allocate
from nanoflow.search.books import search_book
from nanoflow.search.cuts import boundaries, candidates
from nanoflow.search.search import Attempt, Search
from nanoflow.search.shapes import batch_of, cells_of
from nanoflow.search.structure import Deadline, Effort
from nanoflow.simulate.iteration import IterationModel
from tests.unit.test_simulate import GRAPH, SHAPE, pair, profile

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


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


def test_a_program_of_shares_must_beat_what_is_known() -> None:
    """A bound above the best period changes nothing; one below it leaves no shares, whatever the order allows."""
    of = profile(pairs=(pair(0.5, 0.7, 0.7),))
    table, interference = CostTable(of, GRAPH), Interference(of, GRAPH)
    (candidate, *_) = candidates(GRAPH, table, SHAPE, Deadline.after(60.0))

    def period_s(most_s: float | None) -> float | None:
        found = allocate(
            candidate.problem,
            candidate.schedule,
            interference,
            of.setup,
            mechanism=Mechanism.PARTITION,
            max_stages=3,
            effort=Effort(num_nodes=2500, time_limit_s=60.0),
            most_s=most_s,
        )
        return None if found is None else found.schedule.period_s

    best_s = period_s(None)
    assert best_s is not None and candidate.schedule.period_s < best_s * 0.9
    assert period_s(best_s * 1.05) == pytest.approx(best_s, rel=1e-3)
    assert period_s(best_s * 0.98) is None


def test_a_book_has_what_the_search_for_its_median_batch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Books and `--decodes` share one search; with shares of many sizes its best plan gives each task its own."""
    curve = tuple(pair(share, first, second) for share, first, second in ((0.3, 0.3, 0.9), (0.6, 0.7, 0.85)))
    of = profile(pairs=curve)
    small = Search(of, SHAPE).run()
    assert not any(attempt.plan.name.startswith("partition,") for attempt in small.attempts)
    monkeypatch.setattr("nanoflow.search.search._LEAST_SHARED_TOKENS", SHAPE.num_tokens)
    run = [(SHAPE, 1.0)]
    (cell,) = cells_of(run, 512)
    alone = Search(of, cell.median_batch).run()
    (found,) = search_book(of, run, max_batch_tokens=512, time_limit_s=60.0, will_be_tried=True)
    assert found.plans[0].digest == alone.plan.digest and found.gain > 1.3
    divided = [attempt for attempt in alone.attempts if not attempt.plan.name.startswith("partition,")]
    assert divided and alone.makespan_s < min(attempt.makespan_s for attempt in divided)


@pytest.mark.parametrize("place", [0, 3])
def test_no_entry_of_the_stored_book_is_better_than_what_the_search_finds_now(place: int) -> None:
    of = Profile.load(RESULTS / "profile_llama-3-8b_h200.json")
    entry = load_book(RESULTS / "plans_llama-3-8b_h200_1024-512.json").entries[place]
    assert entry.max_keys is not None
    keys = (entry.min_keys + entry.max_keys) / 2 * 2048
    decodes = round((entry.min_decode_share + entry.max_decode_share) / 2 * 2048)
    shape = batch_of(2048, decodes, keys / decodes, 1024.0)
    stored_s = IterationModel(of).predict(shape, entry.plan).makespan_s
    assert Search(of, shape).run().makespan_s <= stored_s * (1 + 1e-9)
