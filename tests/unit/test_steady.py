"""`benchmarks/steady.py`: requests under way, turns of rungs on one engine, and what is made of them; on no GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from benchmarks import ablation, steady
from benchmarks.steady_document import SteadyDocument, SteadyWorkload, table
from benchmarks.turns import Iteration, Turn, order_of_turns, rungs_of

from nanoflow.bench.workload import Lengths, under_way
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.executor.worker import Worker
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


def turn(rung: str, num_tokens: int, energy_j: float | None = None, repeat: int = 0) -> Turn:
    """Of 2 s and 4 iterations, a quarter of them prompts."""
    num_decodes = num_tokens // 4 - num_tokens // 16
    shape = BatchShape(num_tokens=num_tokens // 4, num_decode_tokens=num_decodes, decode_context=3 * num_tokens)
    plans = [BOOK.fallback.digest, *([CUT_PLAN if rung == "cut" else BOOK.fallback.digest] * 3)]
    return Turn(
        rung=rung,
        repeat=repeat,
        start_s=5.0,
        stop_s=7.0,
        iterations=[Iteration(shape=shape, plan=plan, seconds=0.5) for plan in plans],
        energy_j=energy_j,
    )


def test_requests_under_way_are_anywhere_in_their_completions() -> None:
    found = under_way([Lengths(num_prompt_tokens=40, num_output_tokens=90)], 1_000_000, 300, 0)
    assert len(found) == 300
    assert {length.num_prompt_tokens + length.num_output_tokens for length in found} == {130}
    assert all(length.num_prompt_tokens - length.num_computed == 1 for length in found)
    thirds = [sum(low <= length.num_prompt_tokens - 40 < low + 30 for length in found) for low in (0, 30, 60)]
    assert sum(thirds) == 300 and min(thirds) >= 80


def test_requests_that_stay_longer_are_met_more_often() -> None:
    short, long = Lengths(num_prompt_tokens=1, num_output_tokens=10), Lengths(num_prompt_tokens=2, num_output_tokens=30)
    found = under_way([short, long], 1_000_000, 4000, 1)
    num_long = sum(length.num_prompt_tokens + length.num_output_tokens == 32 for length in found)
    assert len(found) == 4000 and num_long / len(found) == pytest.approx(0.75, abs=0.03)


def test_requests_under_way_fit_into_the_cache() -> None:
    """With what they have generated."""
    found = under_way([Lengths(num_prompt_tokens=100, num_output_tokens=50)], 2000, 2000, 0)
    assert 2000 - 150 <= sum(length.num_prompt_tokens for length in found) <= 2000


def test_a_benchmark_begins_in_the_middle_of_requests() -> None:
    """All at once, as many as can be admitted, and none of them computes its prompt."""
    config = EngineConfig(device="cpu", max_batch_tokens=64, max_num_seqs=16, num_pages=60, num_threads=1)
    engine = build_engine(config)
    try:
        lengths = [Lengths(num_prompt_tokens=40, num_output_tokens=30)]
        run = steady._Run(engine, PlanBook(fallback=sequential_plan(GRAPH, 64)), lengths, seed=0)
        num_running = engine.stats().num_running
        assert num_running == engine.stats().num_waiting + num_running > 8
        ended = run._until(time.monotonic() + 0.05)
        assert ended[0].shape.num_decode_tokens >= num_running and ended[0].shape.decode_context > 40 * num_running
        engine.check_integrity()
    finally:
        run.abort()
        engine.close()


def test_a_turn_in_which_graphs_were_captured_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four runs of an engine prepare something, then none does; then all do, and six attempts are enough."""
    engine = build_engine(EngineConfig(device="cpu", max_batch_tokens=64, max_num_seqs=4, num_pages=60, num_threads=1))
    runs = list[float]()
    try:
        book = PlanBook(fallback=sequential_plan(GRAPH, 64))
        run = steady._Run(engine, book, [Lengths(num_prompt_tokens=40, num_output_tokens=30)], seed=0)
        ended = Iteration(shape=BatchShape(num_tokens=4), plan=book.fallback.digest, seconds=0.1)

        def until(stop_s: float) -> list[Iteration]:
            runs.append(stop_s)
            return [ended]

        monkeypatch.setattr(run, "_until", until)
        clock = steady.Clock(settle_s=0.0, turn_s=1.0, num_turns=1, num_repeats=1)
        monkeypatch.setattr(Worker, "num_prepared", property(lambda _: min(len(runs), 4)))
        for num_runs in (5, 7):
            assert run.turn("sequential", 0, book, clock).iterations == [ended]
            assert len(runs) == num_runs, "one to settle, and one that is not disturbed"
        monkeypatch.setattr(Worker, "num_prepared", property(lambda _: len(runs)))
        run.turn("sequential", 0, book, clock)
        assert len(runs) == 14
    finally:
        monkeypatch.undo()
        run.abort()
        engine.close()


def test_nobody_is_always_first() -> None:
    found = list(order_of_turns(["a", "b", "c"], 3))
    assert "".join(rung for _, rung in found) == "abccbaabc"
    assert [place for place, _ in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_rung_is_compared_with_the_sequential_one_of_its_repeat() -> None:
    """Two turns in the first repeat, one in the second; the rung's batches are predicted to take 0.8 of the time."""
    turns = [
        *(turn("sequential", 700, 2.0), turn("cut", 960, 1.2), turn("cut", 880, 1.1), turn("sequential", 900, 2.0)),
        *(turn("cut", 960, 1.2, repeat=1), turn("sequential", 800, 2.0, repeat=1)),
    ]
    base, cut = rungs_of(turns, BOOKS, lambda rung, _shape: 1.0 if rung == "sequential" else 0.8)
    assert base.ratios == base.weighed_ratios == [1.0, 1.0] and base.predicted_ratio == 1.0 and base.planned_part == 0.0
    assert base.tokens_per_s == [400.0, 400.0] and cut.tokens_per_s == [460.0, 480.0]
    assert cut.ratios == pytest.approx([1.15, 1.2]) and cut.predicted_ratio == pytest.approx(1.25)
    assert cut.planned_part == 0.75 and cut.prompt_part == 0.25 and cut.decode_context == pytest.approx(16.0)
    assert cut.iteration_tokens == pytest.approx(2800 / 12)
    assert base.energy_per_token_j == [4.0 / 1600, 2.0 / 800]
    # All batches weigh the same, 4 of them a turn: two turns took 4 J sequentially and 2.3 J under the plan.
    assert cut.weighed_energy_ratios == pytest.approx([2.3 / 4.0, 0.6]) and base.weighed_energy_ratios == [1.0, 1.0]
    assert cut.energy_per_token_j == pytest.approx([2.3 / 1840, 1.2 / 960])
    # Three quarters of the time under the plan, on batches predicted to take as long as any.
    assert [each.plan for each in cut.plans] == ["nano-batches", "sequential"]
    assert [each.part for each in cut.plans] == [0.75, 0.25] and base.plans[0].gain == pytest.approx(1.0)
    assert [each.gain for each in cut.plans] == pytest.approx([1.0, 1.0])
    assert [each.predicted_gain for each in cut.plans] == pytest.approx([1.25, 1.25])
    unmetered, _ = rungs_of([replace(turns[0], energy_j=None), *turns[1:]], BOOKS, _one)
    assert unmetered.energy_per_token_j is None and unmetered.weighed_energy_ratios is None


def _one(_rung: str, _shape: BatchShape) -> float:
    return 1.0


def test_what_batches_differ_by_is_weighed_off() -> None:
    """Twice the tokens in as many iterations and as much time: worth twice if each takes twice sequentially, else no
    more."""
    turns = [turn("sequential", 800), turn("cut", 1600)]
    found = rungs_of(turns, BOOKS, lambda _rung, shape: float(shape.num_tokens))
    assert found[1].ratios == [2.0] and found[1].weighed_ratios == pytest.approx([2.0])
    found = rungs_of(turns, BOOKS, _one)
    assert found[1].ratios == [2.0] and found[1].weighed_ratios == pytest.approx([1.0])


def test_what_a_prediction_misses_of_prompts_is_learnt_from_sequential_turns() -> None:
    """Batches take 1 s and 2 ms more for each token of a prompt, of which the prediction knows nothing."""

    def timed(rung: str, num_prompts: Sequence[int], speed: float) -> Turn:
        shapes = [BatchShape(num_tokens=100 + count, num_decode_tokens=100) for count in num_prompts]
        times_s = [(1.0 + 0.002 * count) / speed for count in num_prompts]
        plan = BOOK.fallback.digest if rung == "sequential" else CUT_PLAN
        iterations = [
            Iteration(shape=shape, plan=plan, seconds=time_s) for shape, time_s in zip(shapes, times_s, strict=True)
        ]
        return Turn(rung=rung, repeat=0, start_s=0.0, stop_s=sum(times_s), iterations=iterations)

    turns = [timed("sequential", mix, 1.0) for mix in ([0, 0, 500], [0, 400], [0, 0, 0], [500, 500, 0])]
    _, cut = rungs_of([*turns, timed("cut", [500, 400, 500], 1.1)], BOOKS, _one)
    assert cut.ratios[0] > 1.2 and cut.weighed_ratios == pytest.approx([1.1], rel=2e-3)
    (plan,) = cut.plans
    assert plan.digest == CUT_PLAN and plan.part == 1.0 and plan.gain == pytest.approx(1.1, rel=2e-3)


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
        (["--rungs", "searched"], "make it with python -m benchmarks.ablation --prepare"),
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
    prepared = [*folder, "--prepare", *rungs, "--workloads", "300/8:10", "--max-batch-tokens", "512", *CPU]
    assert ablation.main([*prepared, "--max-num-seqs", "16"]) == 0
    json_path = tmp_path / "steady.json"
    turns = ["--turn", "0.2", "--settle", "0.05", "--turns", "2", "--repeats", "2", "--json", str(json_path)]
    for workload in ("300/8", "200/4", "300/8"):
        assert steady.main([*folder, *rungs, *turns, *OPTIONS, "--workloads", workload]) == 0
    document = msgspec.json.decode(json_path.read_bytes(), type=SteadyDocument)
    assert [each.workload for each in document.workloads] == ["200/4", "300/8"]
    for found in document.workloads:
        sequential, cut = found.rungs
        assert (sequential.rung, sequential.planned_part, sequential.ratios) == ("sequential", 0.0, [1.0, 1.0])
        assert cut.rung == "nano-batches" and cut.planned_part > 0.5 and cut.prompt_part > 0.8
        assert min(*cut.tokens_per_s, *cut.weighed_ratios, cut.predicted_ratio) > 0 and len(cut.weighed_ratios) == 2
        assert cut.energy_per_token_j is None and found.serial_tokens_per_s is None
    assert "nano-batches" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        steady.main([*folder, *rungs, *turns, *OPTIONS, "--max-num-seqs", "8"])
    assert "name another file" in capsys.readouterr().err


def test_the_table_has_a_line_a_rung() -> None:
    rungs = rungs_of([turn("sequential", 800, 2.0), turn("cut", 960, 1.2)], BOOKS, _one)
    workload = SteadyWorkload(
        workload="64/8",
        created_utc="2026-11-24T00:00:00+00:00",
        git_revision=None,
        num_turns=1,
        turn_s=2.0,
        is_corrected=True,
        serial_tokens_per_s=500.0,
        optimal_tokens_per_s=None,
        rungs=rungs,
    )
    document = SteadyDocument(model="m", options={}, machine={}, software={}, workloads=[workload])
    head, _, sequential, cut, *plans = table(document.workloads).splitlines()
    assert head == "64/8; serial bound 500 tokens/s" and sequential.split()[:2] == ["sequential", "400"]
    assert cut.split()[:2] == ["cut", "480"] and "1.200" in cut
    assert plans[0].strip() == "75% of its time 1.000 (predicted 1.000) nano-batches" and len(plans) == 2
    assert json.loads(msgspec.json.encode(document))["benchmark"] == "steady"
