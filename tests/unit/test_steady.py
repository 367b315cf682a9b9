"""`benchmarks/ladder/steady.py`: requests under way, turns of rungs on one engine, and their metrics; on no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.ladder import steady, steady_engine
from benchmarks.ladder.turns import Iteration, Turn, UnequalTurns, metrics_of

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.graph.operation import BatchShape
from nanoflow.models.config_json import load
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, PlanBook, PlanEntry, StoredBook
from nanoflow.plan.plan import PipelinePlan, PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.workload import Lengths, under_way
from tests.fake_engine import fake_facts
from tests.unit.test_serving import rendered

CPU = ("--model", "default", "--device", "cpu", "--dtype", "float32", "--num-threads", "1")
GRAPH = build_graph(preset_config("llama-3-8b"), None)
BOOK = PlanBook(fallback=sequential_plan(GRAPH, 512))
CUT = PlanBook(
    fallback=BOOK.fallback,
    entries=(PlanEntry(plan=nanobatch_plan(GRAPH, 512, [256]), min_tokens=300, max_tokens=512),),
)
CUT_PLAN = CUT.entries[0].plan.digest
BOOKS = {"sequential": BOOK, "cut": CUT}


def turn(rung: str, seconds: Sequence[float], energy_j: float | None = None) -> Turn:
    """Iterations of 200 tokens, a quarter of them prompts; under the cut book all but the first have its plan."""
    shape = BatchShape(num_tokens=200, num_decode_tokens=150, decode_context=150 * 16)
    plans = [BOOK.fallback.digest, *([CUT_PLAN if rung == "cut" else BOOK.fallback.digest] * (len(seconds) - 1))]
    return Turn(
        rung=rung,
        start_s=5.0,
        stop_s=5.0 + sum(seconds),
        iterations=[
            Iteration(shape=shape, plan=plan, seconds=time_s) for plan, time_s in zip(plans, seconds, strict=True)
        ],
        energy_j=energy_j,
    )


def test_requests_under_way_are_anywhere_in_their_completions() -> None:
    found = under_way([Lengths(num_prompt_tokens=40, num_output_tokens=90)], 1_000_000, 300, 1000, 0)
    assert len(found) == 300
    assert {length.num_prompt_tokens + length.num_output_tokens for length in found} == {130}
    assert all(length.num_prompt_tokens - length.num_computed == 1 for length in found)
    thirds = [sum(low <= length.num_prompt_tokens - 40 < low + 30 for length in found) for low in (0, 30, 60)]
    assert sum(thirds) == 300 and min(thirds) >= 80


def test_requests_that_stay_longer_are_met_more_often() -> None:
    short, long = Lengths(num_prompt_tokens=1, num_output_tokens=10), Lengths(num_prompt_tokens=2, num_output_tokens=30)
    found = under_way([short, long], 1_000_000, 4000, 1 << 30, 1)
    num_long = sum(length.num_prompt_tokens + length.num_output_tokens == 32 for length in found)
    assert len(found) == 4000 and num_long / len(found) == pytest.approx(0.75, abs=0.03)


def test_requests_under_way_fit_into_the_cache() -> None:
    """With what they have generated."""
    found = under_way([Lengths(num_prompt_tokens=100, num_output_tokens=50)], 2000, 2000, 1 << 30, 0)
    assert 2000 - 150 <= sum(length.num_prompt_tokens for length in found) <= 2000


@pytest.fixture
def engine() -> Iterator[Engine]:
    config = EngineConfig(device="cpu", max_batch_tokens=64, max_num_seqs=16, num_pages=60, num_threads=1)
    with closing(build_engine(config)) as made:
        yield made


SMALL_BOOK = PlanBook(fallback=sequential_plan(GRAPH, 64))
LENGTHS = [Lengths(num_prompt_tokens=40, num_output_tokens=30), Lengths(num_prompt_tokens=9, num_output_tokens=5)]


def test_where_prompts_fill_iterations_few_requests_are_under_way() -> None:
    """Of 2,048 tokens an iteration a sixteenth are decodes, since completions are a sixteenth of all tokens."""
    found = under_way([Lengths(num_prompt_tokens=1920, num_output_tokens=128)], 1 << 30, 1024, 2048, 0)
    assert len(found) == 128


def test_a_benchmark_begins_in_the_middle_of_requests(engine: Engine) -> None:
    """All at once, as many as can be admitted, and none of them computes its prompt."""
    with closing(steady_engine._Run(engine, LENGTHS[:1], (0, 0), SMALL_BOOK)) as run:
        num_running = engine.stats().num_running
        assert num_running == engine.stats().num_waiting + num_running > 8
        (first,) = run.iterations(1)
        assert first.shape.num_decode_tokens >= num_running and first.shape.decode_context > 40 * num_running
        engine.check_integrity()
    assert not engine.has_work and engine.stats().pages_in_use == 0


def test_the_same_beginning_has_the_same_batches(engine: Engine) -> None:
    found = []
    for seed in ((0, 0), (0, 0), (0, 1)):
        with closing(steady_engine._Run(engine, LENGTHS, seed, SMALL_BOOK)) as run:
            found.append([iteration.shape for iteration in run.iterations(40)])
    assert found[0] == found[1] != found[2] and len({shape.num_tokens for shape in found[0]}) > 3


def test_a_turn_in_which_graphs_were_captured_is_begun_again() -> None:
    """The first three runs of an engine prepare something, then none does; then all do: three attempts are enough."""
    runs = list[int]()

    class Run:
        """Notes that it settles and that it counts."""

        def __init__(self, _book: PlanBook) -> None: ...

        @property
        def num_prepared(self) -> int:
            return min(len(runs), limit)

        def iterations(self, count: int) -> list[Iteration]:
            runs.append(count)
            return [Iteration(shape=BatchShape(num_tokens=4), plan="p", seconds=0.1)] * count

        def close(self) -> None: ...

    def turn_takes(num_runs: int) -> None:
        before = len(runs)
        found = steady_engine.take_turn(Run, "cut", SMALL_BOOK, steady_engine.Counts(num_settling=2, num_counted=5))  # type: ignore[arg-type]
        assert len(found.iterations) == 5 and found.rung == "cut"
        assert runs[before:] == [2, 5] * (num_runs // 2)

    limit = 3
    turn_takes(4)
    turn_takes(2)
    limit = 1000
    turn_takes(6)


def test_a_turn_has_as_many_iterations_as_the_sequential_rung_has_in_its_time(engine: Engine) -> None:
    begin = partial(steady_engine._Run, engine, LENGTHS, (0, 0))
    clock = steady_engine.Clock(settle_s=0.0, turn_s=0.2, num_turns=1)
    counts = steady_engine.counts_of(begin, SMALL_BOOK, clock)
    assert counts.num_settling == 0 and counts.num_counted > 1
    assert steady_engine.counts_of(begin, SMALL_BOOK, replace(clock, turn_s=1e-9)).num_counted == 1


@pytest.mark.parametrize(("repeat", "order"), [(0, "abc" + "cba" + "abc"), (1, "cba" + "abc" + "cba")])
def test_rungs_take_turns_forwards_and_backwards(repeat: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what drifts evenly, as a card that gets warmer does, would tell for one of them."""
    begins, seen = list[tuple[int, ...]](), list[str]()

    def take_turn(begin: Any, rung: str, _book: PlanBook, _counts: steady_engine.Counts) -> Turn:
        begins.append(begin.args[-1])
        seen.append(rung)
        return turn(rung, [1.0])

    monkeypatch.setattr(steady_engine, "take_turn", take_turn)
    counts = steady_engine.Counts(num_settling=0, num_counted=1)
    monkeypatch.setattr(steady_engine, "counts_of", lambda *_: counts)
    clock = steady_engine.Clock(settle_s=0.0, turn_s=1.0, num_turns=3)
    engine: Any = SimpleNamespace(facts=fake_facts())
    found = steady_engine.measure(engine, dict.fromkeys("abc", BOOK), LENGTHS, clock, (7, repeat))
    assert "".join(seen) == "".join(each.rung for each in found) == order
    # Turns that are compared begin alike.
    assert begins == [(7, repeat, place) for place in range(3) for _ in "abc"]


def _predicted_s(plan: PipelinePlan, _shape: BatchShape) -> float:
    return 0.8 if plan.digest == CUT_PLAN else 1.0


def test_a_rung_is_compared_with_the_sequential_one_on_the_same_batches() -> None:
    """Two turns; the cut batches are predicted to take 0.8 of the time, but 200 tokens are not cut by the book."""
    turns = [
        *(turn("sequential", [1.0, 1.0], 4.0), turn("cut", [1.0, 0.75], 3.0)),
        *(turn("cut", [1.1, 0.9], 3.0), turn("sequential", [1.0, 1.5], 5.0)),
    ]
    found = metrics_of(turns, BOOKS, "sequential", predicted_s=_predicted_s)
    base, cut = found["sequential"], found["cut"]
    assert base.gain == base.energy_ratio == base.predicted_gain == 1.0
    assert cut.gain == pytest.approx(4.5 / 3.75) and cut.predicted_gain == 1.0
    assert base.total_tokens_per_s == pytest.approx(800 / 4.5) and cut.total_tokens_per_s == pytest.approx(800 / 3.75)
    assert cut.energy_ratio == pytest.approx(6 / 9) and base.energy_per_token_j == pytest.approx(9 / 800)
    assert cut.plan_iterations == {BOOK.fallback.digest: 2, CUT_PLAN: 2} and cut.duration_s == 3.75
    assert (cut.prompt_part, cut.decode_context, cut.iteration_tokens) == (0.25, 16.0, 200.0)
    # Each plan against the same iterations of the sequential rung.
    assert [each.plan for each in cut.plans] == ["sequential", "nano-batches"]
    assert [each.gain for each in cut.plans] == pytest.approx([2.0 / 2.1, 2.5 / 1.65])
    assert [each.part for each in cut.plans] == pytest.approx([2.1 / 3.75, 1.65 / 3.75])
    unmetered = metrics_of([replace(turns[0], energy_j=None), *turns[1:]], BOOKS, "sequential")
    assert unmetered["sequential"].energy_per_token_j is None and unmetered["cut"].energy_ratio is None
    assert unmetered["cut"].energy_per_token_j is not None and unmetered["cut"].predicted_gain is None


def test_a_prediction_is_of_the_plans_that_the_book_chooses() -> None:
    large = BatchShape(num_tokens=400, num_decode_tokens=300, decode_context=4800)
    turns = [
        replace(each, iterations=[replace(one, shape=large) for one in each.iterations])
        for each in (turn("sequential", [1.0, 1.0]), turn("cut", [1.0, 0.8]))
    ]
    found = metrics_of(turns, BOOKS, "sequential", predicted_s=_predicted_s)
    assert found["cut"].predicted_gain == pytest.approx(1.25) and found["sequential"].predicted_gain == 1.0


def test_without_a_sequential_rung_at_these_limits_there_is_no_gain() -> None:
    cut = metrics_of([turn("cut", [1.0, 0.8], 2.0)], {"cut": CUT}, None)["cut"]
    assert cut.gain is None and cut.energy_ratio is None and cut.energy_per_token_j == pytest.approx(2 / 400)
    assert [each.gain for each in cut.plans] == [None, None]


def test_an_energy_above_the_limit_of_the_card_is_dropped() -> None:
    turns = [turn("sequential", [1.0, 1.0], 4.0), turn("cut", [1.0, 1.0], 1.0)]
    found = metrics_of(turns, BOOKS, "sequential", power_limit_w=1.5)
    assert found["sequential"].energy_per_token_j is None and "above the card's limit" in str(
        found["sequential"].energy_dropped
    )
    assert found["cut"].energy_per_token_j == pytest.approx(1 / 400) and found["cut"].energy_ratio is None


def test_rungs_with_other_batches_are_not_compared() -> None:
    with pytest.raises(UnequalTurns, match="the rung cut had other batches than the rung sequential"):
        metrics_of([turn("sequential", [1.0, 1.0]), turn("cut", [1.0])], BOOKS, "sequential")


def test_an_engine_takes_books_of_plans_that_it_was_made_with() -> None:
    engine = build_engine(EngineConfig(device="cpu", max_batch_tokens=64, num_pages=8, num_threads=1))
    try:
        own = sequential_plan(build_graph(preset_config("llama-3-8b"), None), 64)
        engine.use_book(PlanBook(fallback=own))
        with pytest.raises(
            PlanError, match=r"plan 'nano-batches' .* is not of the book that this engine was made with"
        ):
            engine.use_book(PlanBook(fallback=own, entries=(CUT.entries[0],)))
    finally:
        engine.close()


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches of 33 tokens and more cut in two, at 64 tokens and 12 requests."""
    graph = build_graph(load(locate_model("default", None)), None)
    entry = PlanEntry(plan=nanobatch_plan(graph, 64, [32]), min_tokens=33, max_tokens=64)
    path = tmp_path_factory.mktemp("books") / "book.json"
    path.write_bytes(StoredBook(entries=(entry,), limits=BookLimits(max_batch_tokens=64, max_num_seqs=12)).to_json())
    return path


def _steady(path: Path, *options: str) -> int:
    clock = ("--turn", "0.1", "--settle", "0.02", "--repeats", "2")
    given = ("--json", str(path), "--workloads", "40/8", "--kv-cache-gib", "0.05")
    return steady.main([*CPU, *given, *clock, *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "64"], "workload must be IN/OUT"),
        (["--rungs", "searched=BOOK"], "no sequential rung to compare with"),
        (["--rungs", "sequential=throughput"], "the rung sequential has no limits"),
        (["--turn", "0"], "must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(
    book: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        _steady(
            tmp_path / "s.json", "--rungs", "sequential=64/8", *(each.replace("BOOK", str(book)) for each in options)
        )
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_rungs_take_turns_at_their_own_limits_on_the_embedded_model(
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Engines run here instead of in processes of their own; what is there does not run again."""
    made: list[tuple[int | None, int | None, int | None, int]] = []

    def yielded(function: Callable[..., Any], arguments: Sequence[Any], *_: Any) -> Iterator[Any]:
        (repeat,) = arguments
        made.append(
            (repeat.engine.max_batch_tokens, repeat.engine.max_num_seqs, repeat.engine.num_pages, repeat.number)
        )
        yield from function(*arguments)

    monkeypatch.setattr(steady, "yielded_apart", yielded)
    # A fixed number of iterations: as many as a busy machine manages in a turn may have no large batch.
    counts = steady_engine.Counts(num_settling=2, num_counted=10)
    monkeypatch.setattr(steady_engine, "counts_of", lambda *_: counts)
    path = tmp_path / "steady.json"
    rungs = ("--rungs", "sequential=32/8", "sequential=64/12", f"cut={book}")
    assert _steady(path, *rungs) == 0
    document = json.loads(path.read_text())
    pages = document["runs"][0]["settings"]["num_pages"]
    assert made == [(64, 12, None, 0), (32, 8, pages, 0), (32, 8, pages, 1), (64, 12, pages, 1)]
    assert document["is_complete"] and document["benchmark"] == "steady" and len(document["runs"]) == 6
    results = {each["name"]: each for each in document["results"]}
    best = max("sequential 32/8", "sequential 64/12", key=lambda name: results[name]["total_tokens_per_s"])
    assert {each["base"] for each in results.values()} == {best} and results[best]["ratio"] == 1.0
    cut = results["cut"]
    assert (cut["limits"], cut["num_plans"]) == ("64/12", 1) and cut["planned_part"] > 0.5
    assert len(cut["gains"]) == 2 and results["sequential 64/12"]["gains"] == [1.0, 1.0]
    assert results["sequential 32/8"]["num_requests"] is None
    for run in document["runs"]:
        assert run["settings"]["num_pages"] == pages and run["metrics"]["total_tokens_per_s"] > 0
    assert "times sequential on the same batches" in capsys.readouterr().out
    text, _ = rendered(document, "steady_default", tmp_path / "results", monkeypatch)
    assert "## The steady state: overlap" in text and "| 40/8 | without end | 2 | cut | 64 tokens, 12 requests," in text
    assert f"{pages:,} KV pages" in text
    # Begun again, only what is missing runs: another workload, and what was lost.
    made.clear()
    document["runs"] = [run for run in document["runs"] if (run["asked"]["name"], run["asked"]["repeat"]) != ("cut", 1)]
    path.write_text(json.dumps(document))
    assert _steady(path, *rungs) == 0
    assert made == [(64, 12, pages, 1)]
    assert len(json.loads(path.read_text())["runs"]) == 6
    made.clear()
    assert _steady(path, *rungs, "--fresh", "--time-limit", "0") == 1 and made == []


def test_rungs_that_cannot_be_compared_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other workload is measured nevertheless."""

    def yielded(_function: Any, arguments: Sequence[Any], *_: Any) -> Iterator[steady_engine.Found]:
        (repeat,) = arguments
        blank = steady_engine.Found(workload="", settings={"sequential": {}}, metrics={})
        metrics = metrics_of([turn("sequential", [1.0, 1.0])], {"sequential": BOOK}, "sequential")
        settings = {"sequential": {"max_batch_tokens": 64, "max_num_seqs": 8, "num_plans": 0, "fallback": "f"}}
        yield replace(blank, workload=repeat.workloads[0], reason="other batches")
        yield replace(blank, workload=repeat.workloads[1], metrics=metrics, settings=settings)

    monkeypatch.setattr(steady, "yielded_apart", yielded)
    path = tmp_path / "steady.json"
    assert _steady(path, "--rungs", "sequential=64/8", "--workloads", "40/8", "30/8", "--repeats", "1") == 1
    assert "40/8: other batches" in capsys.readouterr().err
    assert [each["workload"] for each in json.loads(path.read_text())["results"]] == ["30/8"]
