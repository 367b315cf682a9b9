"""Limits: which are tried, which are best with plans and without, on runs that take what a toy model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli import search_book as command
from nanoflow.cli.main import main
from nanoflow.config import ConfigError
from nanoflow.graph.operation import BatchShape, Resource
from nanoflow.hardware import parse_gpus
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, StoredBook, load_book
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import PairPoint
from nanoflow.search import limits as limits_module
from nanoflow.search.books import BookSearch, FoundPlan
from nanoflow.search.limits import (
    LimitsFound,
    OverlapBound,
    Run,
    WithPlans,
    fastest,
    limits_to_try,
    strongest,
    swept,
    worth_searching,
)
from nanoflow.search.shapes import batch_of, cells_of
from nanoflow.search.workloads import SimulatedWorkloads
from nanoflow.simulate.serving import simulate
from nanoflow.trials import iterations as iterations_module
from nanoflow.trials.iterations import Timing, Trial

GRAPH = build_graph(preset_config("llama-3-8b"), None)
PLAN = sequential_plan(GRAPH, 1024)
PROFILE = estimated_profile("preset:llama-3-8b", PRESETS["llama-3-8b"], parse_gpus("a100-80"), 8192)


def limits_of(max_batch_tokens: int, max_num_seqs: int) -> BookLimits:
    return BookLimits(max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)


def found_of(limits: BookLimits, *rates: float, bound: float = 1.0) -> LimitsFound:
    runs = tuple(Run(tokens_per_s=rate, peak_requests=9, bound_tokens_per_s=rate * bound) for rate in rates)
    return LimitsFound(limits=limits, runs=runs)


def test_budgets_go_as_far_as_the_profile_and_given_numbers_win() -> None:
    assert limits_to_try(PROFILE, None, None) == ([1024, 2048, 4096, 8192], [256, 512, 1024, 2048])
    assert limits_to_try(PROFILE, [4096, 3000], [64]) == ([3000, 4096], [64])
    small = replace(PROFILE, points=tuple(point for point in PROFILE.points if point.num_tokens <= 768))
    assert limits_to_try(small, None, [64])[0] == [768]
    with pytest.raises(ConfigError, match=r"16384 is beyond the profile, which has operations of up to 8192 tokens"):
        limits_to_try(PROFILE, [2048, 16384], None)


def test_limits_that_change_nothing_are_left_out() -> None:
    asked = []

    def run_all(limits: BookLimits) -> tuple[Run, ...]:
        asked.append(limits)
        # Of the second workload no more than 300 requests fit into the memory.
        return tuple(
            Run(tokens_per_s=1.0, peak_requests=min(most, limits.max_num_seqs), bound_tokens_per_s=1.0)
            for most in (200, 300)
        )

    found = list(swept([2048, 4096], [256, 512, 1024], run_all))
    assert asked == [limits_of(budget, count) for budget in (2048, 4096) for count in (256, 512)]
    assert [each.limits for each in found] == asked
    asked.clear()
    list(swept([512], [256, 512, 1024], run_all))
    list(swept([128], [256, 512], run_all))
    assert asked == [limits_of(512, 256), limits_of(512, 512), limits_of(128, 256)], "no more requests than tokens"


def test_workloads_count_alike_whatever_their_tokens_cost() -> None:
    # The second workload is a tenth as fast; 20 % there are worth more than 10 % here.
    one, other = found_of(limits_of(2048, 256), 1100.0, 100.0), found_of(limits_of(4096, 256), 1000.0, 120.0)
    assert fastest([one, other]) is other and fastest([one, replace(one)]) is one


def test_plans_are_searched_under_the_best_and_where_they_could_win() -> None:
    best = found_of(limits_of(8192, 512), 100.0, bound=1.02)
    good, better = (found_of(limits_of(2048, count), 95.0, bound=bound) for count, bound in ((512, 1.06), (1024, 1.15)))
    hopeless = found_of(limits_of(2048, 256), 80.0, bound=1.2)
    assert worth_searching([hopeless, good, better, best]) == [best, better, good]
    many = [replace(good, limits=limits_of(2048, count)) for count in range(1, 9)]
    assert len(worth_searching([*many, best])) == limits_module.MAX_SEARCHED


def test_limits_whose_predictions_are_close_are_all_tried() -> None:
    best = found_of(limits_of(8192, 512), 100.0)
    rates = (104.0, 106.0, 105.5, 103.0, 105.0)
    found = [WithPlans(limits=limits_of(2048, 1), rates=(rate,), plans=()) for rate in rates]
    assert [each.rate for each in strongest(found, best)] == pytest.approx([106.0, 105.5, 105.0])
    assert len(strongest(found[:2], best)) == 1 and len(strongest(found[1:3], best)) == 2
    losing = [replace(found[0], rates=(99.0,)), replace(found[0], rates=(98.5,))]
    assert strongest(losing, best) == losing[:1]


def test_overlap_saves_while_both_run() -> None:
    resource_of = {"product": Resource.COMPUTE, "attention": Resource.MEMORY}
    pair = PairPoint(
        first="product",
        second="attention",
        first_tokens=1024,
        second_tokens=340,
        mechanism=Mechanism.PARTITION,
        share=0.5,
        first_performance=0.7,
        second_performance=0.5,
    )
    bound = OverlapBound(replace(PROFILE, pairs=(pair,)), resource_of)
    # Half a second of attention takes one beside products, which do 0.7 of theirs.
    assert bound.saved_s({Resource.COMPUTE: 2.0, Resource.MEMORY: 0.5}) == pytest.approx(0.2)
    # A short product is done after one second, and attention has half a second behind it.
    assert bound.saved_s({Resource.COMPUTE: 0.7, Resource.MEMORY: 2.0}) == pytest.approx(0.2)
    assert bound.saved_s({Resource.COMPUTE: 2.0}) == 0.0 == bound.saved_s({})
    nothing = OverlapBound(replace(PROFILE, pairs=()), resource_of)
    assert nothing.saved_s({Resource.COMPUTE: 1.0, Resource.MEMORY: 1.0}) == 0.0


def test_a_run_is_as_much_faster_as_its_batches() -> None:
    workloads = SimulatedWorkloads(PROFILE, ["64/16"], num_requests=40, seed=0, gpu_memory_utilization=0.9)
    limits = limits_of(256, 32)
    (run,) = workloads.sequential(limits)
    assert run.peak_requests == 32 and run.bound_tokens_per_s > run.tokens_per_s
    assert workloads.rates(limits, lambda _: 1.0) == (run.tokens_per_s,)
    assert workloads.rates(limits, lambda _: 1.25)[0] == pytest.approx(1.25 * run.tokens_per_s)
    (more,) = workloads.sequential(limits_of(256, 64))
    assert more.peak_requests == 40


def test_the_run_of_the_sweep_is_not_simulated_again_for_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def simulated() -> SimulatedWorkloads:
        workloads = ["64/16", "48/24"]
        return SimulatedWorkloads(PROFILE, workloads, num_requests=40, seed=0, gpu_memory_utilization=0.9)

    limits, other = limits_of(256, 32), limits_of(128, 32)
    expected, of_other = simulated().batches(limits), simulated().batches(other)
    workloads, num_runs = simulated(), 0

    def counted(*arguments: Any) -> Any:
        nonlocal num_runs
        num_runs += 1
        return simulate(*arguments)

    monkeypatch.setattr("nanoflow.search.workloads.simulate", counted)
    runs = workloads.sequential(limits)
    assert workloads.batches(limits) == expected != of_other == workloads.batches(other)
    assert workloads.sequential(limits) == runs and workloads.batches(limits) == expected
    assert num_runs == 4, "two workloads under two limits"


class ToyWorkloads:
    """Runs that take what `sequential_rates` says, and with plans as much less as they gain."""

    sequential_rates: dict[int, float]

    def __init__(self, *_: object, **__: object) -> None: ...

    def sequential(self, limits: BookLimits) -> tuple[Run, ...]:
        rate = self.sequential_rates.get(limits.max_batch_tokens, 10.0)
        return (Run(tokens_per_s=rate, peak_requests=limits.max_num_seqs, bound_tokens_per_s=1.3 * rate),)

    def batches(self, limits: BookLimits) -> list[tuple[BatchShape, float]]:
        return [(batch_of(limits.max_batch_tokens, limits.max_batch_tokens // 3, 1280.0, 1024.0), 1.0)]

    def rates(self, limits: BookLimits, gain: Callable[[BatchShape], float]) -> tuple[float, ...]:
        ((shape, _),) = self.batches(limits)
        return (self.sequential_rates[limits.max_batch_tokens] * gain(shape),)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StoredBook]:
    """Runs the command on toy runs: rates and gains by token budget, and what else is given."""
    profile = tmp_path / "profile.json"
    profile.write_bytes(PROFILE.to_json())
    monkeypatch.setattr(command, "SimulatedWorkloads", ToyWorkloads)

    def run(rates: dict[int, float], gains: dict[int, float] | None, *options: str) -> StoredBook:
        def found(_: BookSearch, iterations: list[tuple[BatchShape, float]], budget: int) -> Iterator[FoundPlan]:
            assert gains is not None
            (cell,) = cells_of(iterations, budget)
            plan, gain = sequential_plan(GRAPH, budget), gains[budget]
            yield FoundPlan(cell=cell, part=1.0, gain=gain, plans=(plan,) if gain > 1 else ())

        if gains is not None:
            monkeypatch.setattr(BookSearch, "found", found)
        monkeypatch.setattr(ToyWorkloads, "sequential_rates", rates, raising=False)
        path = tmp_path / "plans.json"
        assert main(["search", str(profile), "-o", str(path), "--max-num-seqs", "512", *options]) == 0
        return load_book(path)

    return run


def test_the_limits_that_are_best_with_plans_are_in_the_book(
    search: Callable[..., StoredBook], capsys: pytest.CaptureFixture[str]
) -> None:
    """Sequentially the largest budget wins, with plans the smallest."""
    book = search({2048: 98.0, 4096: 99.0, 8192: 100.0}, {2048: 1.1, 4096: 1.06, 8192: 1.02})
    assert book.limits == limits_of(2048, 512) and len(book.entries) == 1
    assert book.prediction is not None and book.prediction.sequential_limits == limits_of(8192, 512)
    (workload,) = book.prediction.workloads
    assert (workload.workload, workload.num_requests, workload.sequential_tokens_per_s) == ("512/512", 1500, 100.0)
    assert workload.tokens_per_s == pytest.approx(107.8) and book.prediction.gain == pytest.approx(1.078)
    assert not book.prediction.is_measured and StoredBook.from_json(book.to_json()) == book
    told = capsys.readouterr()
    assert "sequential best: 8,192 tokens, 512 requests: 100 tokens/s, predicted\n" in told.out
    assert "with plans: 2,048 tokens, 512 requests: 108 tokens/s, by gains as predicted\n" in told.out
    assert "predicted for all of 512/512: 1.078x of sequential at its best, 7.8 % faster\n" in told.out
    progress = [line.strip() for line in told.err.splitlines()]
    assert progress[:4] == [
        f"{tokens} tokens, 512 requests: {rate} tokens/s sequentially"
        for tokens, rate in (("1,024", 10), ("2,048", 98), ("4,096", 99), ("8,192", 100))
    ]
    assert (
        progress[4].startswith("plans for 8,192 tokens, 512 requests (x: speed under a plan / ")
        and "100.0% of the time" in progress[5]
    )
    assert progress[-1] == "2,048 tokens, 512 requests: 108 tokens/s with plans, predicted"


def test_larger_budgets_win_with_plans_too(search: Callable[..., StoredBook]) -> None:
    book = search({2048: 90.0, 4096: 99.0, 8192: 100.0}, {2048: 1.1, 4096: 1.06, 8192: 1.02})
    assert book.limits == limits_of(4096, 512) and book.prediction is not None
    assert book.prediction.gain == pytest.approx(0.99 * 1.06)


def test_where_nothing_beats_sequential_the_book_has_its_limits_and_no_plan(
    search: Callable[..., StoredBook], capsys: pytest.CaptureFixture[str]
) -> None:
    book = search({2048: 90.0, 4096: 99.0, 8192: 100.0}, {2048: 1.1, 4096: 1.005, 8192: 1.0})
    assert book.limits == limits_of(8192, 512) and book.entries == ()
    assert book.prediction is not None and book.prediction.gain == 1.0
    told = capsys.readouterr().out
    assert "nothing beats that; the book has these limits and no plan" in told
    assert "the best run with plans, under 4,096 tokens, 512 requests, is 0.5 % slower than the sequential one" in told


def test_a_number_that_is_given_wins(search: Callable[..., StoredBook], capsys: pytest.CaptureFixture[str]) -> None:
    rates, gains = {2048: 98.0, 4096: 99.0, 8192: 100.0}, {2048: 1.1, 4096: 1.06, 8192: 1.02}
    book = search(rates, gains, "--max-batch-tokens", "4096")
    assert book.limits == limits_of(4096, 512) and book.prediction is not None
    assert book.prediction.sequential_limits == limits_of(4096, 512)
    assert "2,048 tokens" not in capsys.readouterr().err
    book = search(rates, gains, "--max-batch-tokens", "8192", "4096")
    capsys.readouterr()
    assert book.limits == limits_of(4096, 512)
    assert search(rates, gains, "--quiet").limits == limits_of(2048, 512) and not capsys.readouterr().err


def test_trials_decide_between_limits_and_none_is_made_twice(
    search: Callable[..., StoredBook], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is predicted to be best loses on the device; a plan that two limits have for one cell is tried once."""
    tried: list[tuple[BatchShape, str]] = []

    def measure(_: object, wanted: list[tuple[BatchShape, PipelinePlan]], **__: object) -> Iterator[Trial]:
        for shape, plan in wanted:
            tried.append((shape, plan.name))
            planned = Timing(time_s=1 / {"common": 1.02, "2048": 0.98, "4096": 1.05}[plan.name], energy_j=None)
            yield Trial(shape=shape, plan=plan, planned=planned, sequential=Timing(time_s=1.0, energy_j=None))

    def found(_: BookSearch, iterations: list[tuple[BatchShape, float]], budget: int) -> Iterator[FoundPlan]:
        # The same cell of smaller batches under both limits, with other batches in it.
        common, small = replace(PLAN, name="common"), batch_of(1024, 340, 1280.0 + budget / 1000, 1024.0)
        own = replace(sequential_plan(GRAPH, budget), name=str(budget))
        for shapes, plan in ((iterations, own), ([(small, 1.0)], common)):
            (cell,) = cells_of(shapes, budget)
            yield FoundPlan(cell=cell, part=0.45, gain=gains[budget], plans=(plan,))

    gains = {2048: 1.1, 4096: 1.085}
    monkeypatch.setattr(command, "_check_machine", lambda _: None)
    monkeypatch.setattr(iterations_module, "measure_trials", measure)
    monkeypatch.setattr(BookSearch, "found", found)
    book = search({2048: 98.0, 4096: 99.0}, None, "--measure", "--max-batch-tokens", "2048", "4096")
    assert book.limits == limits_of(4096, 512) and book.prediction is not None and book.prediction.is_measured
    assert book.prediction.gain == pytest.approx(1.05) and {plan.name for plan in book.plans} == {"4096", "common"}
    assert [name for _, name in tried] == ["2048", "common", "4096"]
    told = capsys.readouterr()
    assert "1 plans to try, about 0 minutes, 1 more were tried before" in told.err
    assert "98 tokens/s with plans, measured" in told.err and "1.050x of sequential at its best" in told.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-batch-tokens", "16384"], "max_batch_tokens 16384 is beyond the profile"),
        (["--max-batch-tokens", "2048", "0"], "max_batch_tokens must be positive, got 0"),
        (["--max-num-seqs", "-1"], "max_num_seqs must be positive, got -1"),
        (["--decodes", "10", "--max-batch-tokens", "2048", "4096"], "--decodes is for one batch"),
    ],
)
def test_limits_that_make_no_sense_are_refused(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_bytes(PROFILE.to_json())
    assert main(["search", str(profile), "-o", str(tmp_path / "plans.json"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "plans.json").exists()


def test_a_request_that_no_memory_holds_is_said() -> None:
    workloads = SimulatedWorkloads(PROFILE, ["9000000/9"], num_requests=1, seed=0, gpu_memory_utilization=0.9)
    with pytest.raises(ConfigError, match="tokens of KV cache for a request of 9000009"):
        workloads.sequential(limits_of(2048, 256))
