"""`benchmarks/steady.py`: requests under way, turns of rungs on one engine, and what is made of them; on no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
from benchmarks import steady
from benchmarks.steady_document import SteadyDocument, SteadyWorkload, table
from benchmarks.turns import Iteration, Turn, UnequalTurns, rungs_of

from nanoflow.bench.workload import Lengths, under_way
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook, PlanEntry
from nanoflow.plan.plan import PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from tests.unit.test_ablation import CPU, path

__all__ = ["path"]
OPTIONS = ("--max-batch-tokens", "512", "--max-num-seqs", "16", "--kv-cache-gib", "0.05", *CPU)
GRAPH = build_graph(preset_config("llama-3-8b"), None)
BOOK = PlanBook(fallback=sequential_plan(GRAPH, 512))
CUT = PlanBook(
    fallback=BOOK.fallback,
    entries=(PlanEntry(plan=nanobatch_plan(GRAPH, 512, [256]), min_tokens=300, max_tokens=512),),
)
CUT_PLAN = CUT.entries[0].plan.digest
BOOKS = {"sequential": BOOK, "cut": CUT}


def turn(rung: str, seconds: Sequence[float], energy_j: float | None = None, repeat: int = 0) -> Turn:
    """Iterations of 200 tokens, a quarter of them prompts; under the cut book all but the first have its plan."""
    shape = BatchShape(num_tokens=200, num_decode_tokens=150, decode_context=150 * 16)
    plans = [BOOK.fallback.digest, *([CUT_PLAN if rung == "cut" else BOOK.fallback.digest] * (len(seconds) - 1))]
    return Turn(
        rung=rung,
        repeat=repeat,
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
    with closing(steady._Run(engine, LENGTHS[:1], (0, 0), SMALL_BOOK)) as run:
        num_running = engine.stats().num_running
        assert num_running == engine.stats().num_waiting + num_running > 8
        (first,) = run.iterations(1)
        assert first.shape.num_decode_tokens >= num_running and first.shape.decode_context > 40 * num_running
        engine.check_integrity()
    assert not engine.has_work and engine.stats().pages_in_use == 0


def test_the_same_beginning_has_the_same_batches(engine: Engine) -> None:
    found = []
    for seed in ((0, 0), (0, 0), (0, 1)):
        with closing(steady._Run(engine, LENGTHS, seed, SMALL_BOOK)) as run:
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
        found = steady.take_turn(Run, "cut", SMALL_BOOK, 1, steady.Counts(num_settling=2, num_counted=5))  # type: ignore[arg-type]
        assert len(found.iterations) == 5 and (found.rung, found.repeat) == ("cut", 1)
        assert runs[before:] == [2, 5] * (num_runs // 2)

    limit = 3
    turn_takes(4)
    turn_takes(2)
    limit = 1000
    turn_takes(6)


def test_a_turn_has_as_many_iterations_as_the_sequential_rung_has_in_its_time(engine: Engine) -> None:
    begin = partial(steady._Run, engine, LENGTHS, (0, 0))
    clock = steady.Clock(settle_s=0.0, turn_s=0.2, num_turns=1, num_repeats=1)
    counts = steady.counts_of(begin, SMALL_BOOK, clock)
    assert counts.num_settling == 0 and counts.num_counted > 1
    assert steady.counts_of(begin, SMALL_BOOK, replace(clock, turn_s=1e-9)).num_counted == 1


def test_a_rung_is_compared_with_the_sequential_one_on_the_same_batches() -> None:
    """Two turns in the first repeat, one in the second; predicted to take 0.8 of the time."""
    turns = [
        *(turn("sequential", [1.0, 1.0], 4.0), turn("cut", [1.0, 0.75], 3.0)),
        *(turn("cut", [1.1, 0.9], 3.0), turn("sequential", [1.0, 1.5], 5.0)),
        *(turn("cut", [0.8, 0.8], 2.4, repeat=1), turn("sequential", [1.0, 1.0], 4.0, repeat=1)),
    ]
    base, cut = rungs_of(turns, BOOKS, lambda rung, _shape: 1.0 if rung == "sequential" else 0.8)
    assert base.gains == base.energy_ratios == [1.0, 1.0] and base.predicted_gain == 1.0 and base.planned_part == 0.0
    assert cut.gains == pytest.approx([4.5 / 3.75, 1.25]) and cut.predicted_gain == pytest.approx(1.25)
    assert base.tokens_per_s == pytest.approx([800 / 4.5, 200.0]) and cut.tokens_per_s == pytest.approx(
        [800 / 3.75, 250]
    )
    assert cut.energy_ratios == pytest.approx([6 / 9, 0.6]) and base.energy_per_token_j == pytest.approx(
        [9 / 800, 0.01]
    )
    assert (cut.planned_part, cut.prompt_part, cut.decode_context, cut.iteration_tokens) == (0.5, 0.25, 16.0, 200.0)
    # Each plan against the same iterations of the sequential rung.
    assert [each.plan for each in cut.plans] == ["sequential", "nano-batches"]
    assert [each.gain for each in cut.plans] == pytest.approx([3.0 / 2.9, 3.5 / 2.45])
    assert [each.part for each in cut.plans] == pytest.approx([2.9 / 5.35, 2.45 / 5.35])
    assert [each.predicted_gain for each in cut.plans] == pytest.approx([1.25, 1.25])
    unmetered, _ = rungs_of([replace(turns[0], energy_j=None), *turns[1:]], BOOKS, _one)
    assert unmetered.energy_per_token_j is None and unmetered.energy_ratios is None


def _one(_rung: str, _shape: BatchShape) -> float:
    return 1.0


def test_rungs_with_other_batches_are_not_compared() -> None:
    with pytest.raises(UnequalTurns, match="the rung cut had other batches than the sequential one"):
        rungs_of([turn("sequential", [1.0, 1.0]), turn("cut", [1.0])], BOOKS, _one)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "64"], "workload must be IN/OUT"),
        (["--workloads", "8000/1000"], "a request has 9,000"),
        (["--rungs", "offload"], "there is no rung 'offload'"),
        (["--turn", "0"], "must be positive"),
        (["--model", "preset:llama-3-8b"], "the profile is of default, not of preset:llama-3-8b"),
    ],
)
def test_what_makes_no_sense_is_refused(
    path: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        steady.main(["--profile", str(path), "--json-folder", str(tmp_path), "--workloads", "64/8", *OPTIONS, *options])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_two_rungs_take_turns_on_the_embedded_model(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second workload is added to the document, and one that is measured again replaced."""
    folder = ["--profile", str(path), "--json-folder", str(tmp_path)]
    rungs = ["--rungs", "sequential", "nano-batches"]
    assert steady.main([*folder, *rungs, *OPTIONS, "--workloads", "300/8", "--prepare"]) == 0
    assert [made.name for made in (tmp_path / "books").iterdir()] == ["default_nano-batches.json"]
    json_path = tmp_path / "steady.json"
    turns = ["--turn", "0.2", "--settle", "0.05", "--turns", "2", "--repeats", "2", "--json", str(json_path)]
    for workload in ("300/8", "200/4", "300/8"):
        assert steady.main([*folder, *rungs, *turns, *OPTIONS, "--workloads", workload]) == 0
    document = msgspec.json.decode(json_path.read_bytes(), type=SteadyDocument)
    assert [each.workload for each in document.workloads] == ["200/4", "300/8"]
    for found in document.workloads:
        sequential, cut = found.rungs
        assert (sequential.rung, sequential.planned_part, sequential.gains) == ("sequential", 0.0, [1.0, 1.0])
        assert cut.rung == "nano-batches" and cut.planned_part > 0.5 and cut.prompt_part > 0.8
        assert min(*cut.tokens_per_s, *cut.gains, cut.predicted_gain) > 0 and len(cut.gains) == 2
        assert found.has_same_batches and cut.iteration_tokens == sequential.iteration_tokens
        assert cut.energy_per_token_j is None and found.serial_tokens_per_s is None
    assert "nano-batches" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        steady.main([*folder, *rungs, *turns, *OPTIONS, "--max-num-seqs", "8"])
    assert "name another file" in capsys.readouterr().err


def test_the_table_has_a_line_a_rung() -> None:
    rungs = rungs_of([turn("sequential", [0.5] * 4, 2.0), turn("cut", [0.5, 0.4, 0.4, 0.3], 1.2)], BOOKS, _one)
    workload = SteadyWorkload(
        workload="64/8",
        created_utc="2026-11-24T00:00:00+00:00",
        git_revision=None,
        num_turns=1,
        turn_s=2.0,
        has_same_batches=True,
        serial_tokens_per_s=500.0,
        optimal_tokens_per_s=None,
        rungs=rungs,
    )
    document = SteadyDocument(model="m", options={}, machine={}, software={}, workloads=[workload])
    head, _, sequential, cut, *plans = table(document.workloads).splitlines()
    assert head == "64/8; serial bound 500 tokens/s" and sequential.split()[:2] == ["sequential", "400"]
    assert cut.split()[:3] == ["cut", "500", "1.250"] and "0.600" in cut
    assert plans[0].strip() == "69% of its time 1.364 (predicted 1.000) nano-batches" and len(plans) == 2
    assert json.loads(msgspec.json.encode(document))["benchmark"] == "steady"
