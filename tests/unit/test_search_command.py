"""`nanoflow search`: from a profile to a plan or a plan book, in words and in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.cli import search_book as search_book_command
from nanoflow.cli.main import main
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, StoredBook, load_book
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import Lane, PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.table import Profile
from nanoflow.search import search as search_module
from nanoflow.search.books import BookSearch, FoundPlan, divided, search_book
from nanoflow.search.carry import carry_plan
from nanoflow.search.limits import Run
from nanoflow.search.shapes import batch_of, cells_of, entry_of, leading, least_predicted_gain, ranked
from nanoflow.trials import iterations
from nanoflow.trials.iterations import Timing, Trial
from nanoflow.trials.journal import TrialJournal
from tests.plans import ping_pong_plan

GRAPH = build_graph(preset_config("llama-3-8b"), None)
LANES = (Lane(name="first"), Lane(name="second"))
INTERRUPTED = 130
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "a100.json"
    assert main(["profile", "preset:llama-3-8b", "-o", str(path), "--estimate", "a100-80"]) == 0
    return path


def test_one_batch_gives_one_plan(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A short search, of one candidate: how good the plan is does not matter here.
    monkeypatch.setattr(search_module, "_MAX_SHARED", 1)
    monkeypatch.setattr(search_module, "_ALLOCATION_NODES", 400)
    path = tmp_path / "plan.json"
    command = ["search", str(profile), "-o", str(path), "--max-batch-tokens", "1024", "--decodes", "512"]
    assert main([*command, "--context", "1024"]) == 0
    told = capsys.readouterr()
    assert "1,024 tokens, 512 of them decodes with 1,024 keys each" in told.out and "x of sequential" in told.out
    assert "sequential:" in told.err, "the way there"
    plan = PipelinePlan.load(path)
    assert plan.num_tokens == 1024 and len(plan.lanes) > 1 and plan.digest in told.out


def test_a_workload_gives_a_book(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plans.json"
    options = ["--workloads", "256/64", "--num-requests", "100", "--max-batch-tokens", "512", "--max-num-seqs", "256"]
    assert main(["search", str(profile), "-o", str(path), *options, "--time-limit", "5"]) == 0
    book = load_book(path)
    assert book.made_for is not None and book.made_for.gpu == "NVIDIA A100 80 GB SXM"
    told = capsys.readouterr()
    assert f"in {len(book.entries)} ranges" in told.out and "sequential best: 512 tokens, 256 requests: " in told.out
    assert "% of the time: " in told.err and "512 tokens, 256 requests: " in told.err, "the way there"
    assert book.limits == BookLimits(max_batch_tokens=512, max_num_seqs=256)
    for entry in book.entries:
        assert entry.min_tokens <= entry.max_tokens == entry.plan.num_tokens


def test_with_a_gpu_only_plans_that_win_there_stay(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[Trial] = []

    def measure(_: Profile, wanted: Sequence[tuple[BatchShape, PipelinePlan]], **__: object) -> Iterator[Trial]:
        for shape, plan in wanted:
            is_winner = plan.name.startswith("partition") and shape.num_decode_tokens % 2
            planned = Timing(time_s=0.9 if is_winner else 1.2, energy_j=None)
            tried.append(Trial(shape=shape, plan=plan, planned=planned, sequential=Timing(time_s=1.0, energy_j=None)))
            yield tried[-1]

    monkeypatch.setattr(search_book_command, "_check_machine", lambda _: None)
    monkeypatch.setattr(iterations, "measure_trials", measure)
    path = tmp_path / "plans.json"
    options = ["--workloads", "64/256", "--num-requests", "384", "--max-batch-tokens", "512", "--max-num-seqs", "384"]
    assert main(["search", str(profile), "-o", str(path), *options, "--time-limit", "5", "--measure"]) == 0
    told = capsys.readouterr()
    winners = {trial.shape for trial in tried if trial.gain > 1}
    losers = {trial.shape for trial in tried} - winners
    assert winners and losers and len(load_book(path).entries) == len(winners)
    assert told.err.count("measured 1.111x, partition") == len(winners)
    assert told.err.count("measured 0.833x, sequential") == len(losers)
    assert "measured for all of 64/256" in told.out


def test_an_interrupted_search_keeps_what_it_tried(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[tuple[BatchShape, str]] = []
    left = 3
    cells = cells_of(
        [(batch_of(2048, 400, keys, 512.0), 1.0) for keys in (500.0, 900.0, 1500.0)], max_batch_tokens=2048
    )
    plans = tuple(replace(sequential_plan(GRAPH, 2048), name=name) for name in ("first", "second"))
    found = [FoundPlan(cell=cell, part=0.3, gain=1.1, plans=plans) for cell in cells]

    def measure(_: Profile, wanted: Sequence[tuple[BatchShape, PipelinePlan]], **__: object) -> Iterator[Trial]:
        for shape, plan in wanted:
            if len(tried) == left:
                raise KeyboardInterrupt
            tried.append((shape, plan.digest))
            planned = Timing(time_s=0.5 + int(plan.digest, 16) % 49 / 100, energy_j=None)
            yield Trial(shape=shape, plan=plan, planned=planned, sequential=Timing(time_s=1.0, energy_j=None))

    class Simulated:
        """Runs that take what their plans leave, so that any plan that wins is worth it."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def sequential(self, _: BookLimits) -> tuple[Run, ...]:
            return (Run(tokens_per_s=100.0, peak_requests=400, bound_tokens_per_s=150.0),)

        def batches(self, _: BookLimits) -> list[tuple[BatchShape, float]]:
            return []

        def rates(self, _: BookLimits, gain: Callable[[BatchShape], float]) -> tuple[float, ...]:
            return (100.0 * max(gain(cell.example) for cell in cells),)

    monkeypatch.setattr(search_book_command, "SimulatedWorkloads", Simulated)
    monkeypatch.setattr(BookSearch, "found", lambda *_: iter(found))
    monkeypatch.setattr(search_book_command, "_check_machine", lambda _: None)
    monkeypatch.setattr(iterations, "measure_trials", measure)
    whole, path = tmp_path / "whole.json", tmp_path / "plans.json"
    journal = tmp_path / "plans.json.trials"

    def search(output: Path, *more: str) -> int:
        limits = ["--max-batch-tokens", "2048", "--max-num-seqs", "400"]
        return main(["search", str(profile), "-o", str(output), "--measure", *limits, *more])

    assert search(path) == INTERRUPTED and journal.read_bytes().count(b"gain") == 3 and not path.exists()
    with journal.open("ab") as file:
        file.write(b'\n{"profile": "cut')
    left = 4
    assert search(path) == INTERRUPTED and "3 more were tried before" in capsys.readouterr().err
    left = 100
    assert search(path) == 0 and "4 more were tried before" in capsys.readouterr().err
    assert len(tried) == len(set(tried)) == 6 and not journal.exists(), "none twice, and the file goes"
    assert search(whole) == 0 and path.read_bytes() == whole.read_bytes() and len(tried) == 12
    assert load_book(whole).entries, "something is in it"
    left = 14
    assert search(path) == INTERRUPTED
    left = 100
    assert search(path, "--fresh") == 0 and len(tried) == 20


def test_the_journal_is_of_one_profile(profile: Path, tmp_path: Path) -> None:
    stored = Profile.load(profile)
    shape, plan = batch_of(2048, 683, 1280.0, 1024.0), sequential_plan(GRAPH, 2048)
    second = Timing(time_s=1.0, energy_j=None)
    journal = TrialJournal(tmp_path / "trials", stored)
    assert (shape, plan) not in journal
    journal.add(Trial(shape=shape, plan=plan, planned=replace(second, time_s=0.8), sequential=second))
    assert journal[shape, plan] == 1.25 == TrialJournal(tmp_path / "trials", stored)[shape, plan]
    assert (shape, sequential_plan(GRAPH, 1024)) not in journal
    assert (batch_of(2048, 683, 1290.0, 1024.0), plan) not in journal
    assert (shape, plan) not in TrialJournal(tmp_path / "trials", replace(stored, page_size=32))


def test_what_a_device_says_decides() -> None:
    (cell,) = cells_of([(batch_of(2000, 700, 1000.0, 512.0), 1.0)], max_batch_tokens=2048)
    first, second = (replace(sequential_plan(GRAPH, 2048), name=name) for name in ("first", "second"))
    found = FoundPlan(cell=cell, part=0.5, gain=1.25, plans=(first, second))
    assert found.entry is not None and found.entry.plan is first
    winner = found.confirmed([1.006, 1.04])
    assert winner.entry is not None and winner.entry.plan is second
    assert winner.measured_gain == winner.expected_gain == 1.04
    loser = found.confirmed([1.004, 0.97])
    assert loser.entry is None and loser.expected_gain == 1.0 and loser.measured_gain == 1.004


def test_the_best_plans_and_the_best_of_each_mechanism_lead() -> None:
    inside, also, third = (carry_plan(GRAPH, 2048, 1024, share, ("gate_up_proj",)) for share in (0.8, 0.75, 0.67))
    parted, streams, beside = (
        replace(ping_pong_plan(GRAPH, 2048, 1024, mechanism, share=0.75), name=str(mechanism))
        for mechanism in (Mechanism.PARTITION, Mechanism.STREAM, Mechanism.BESIDE)
    )
    plans = [inside, also, third, parted, streams, beside]
    assert leading(plans, 2) == [inside, also, parted, streams, beside]
    assert leading(plans[2:], 4) == plans[2:] and leading([], 2) == []
    again = replace(inside, predicted_makespan_s=1.0)
    assert leading([inside, again, also], 2) == [inside, also] and leading([again, inside, also], 2) == [again, also]


def test_more_plans_are_tried_where_a_run_spends_its_time() -> None:
    profile = Profile.load(RESULTS / "profile_llama-3-8b_h200.json")
    rare, common, rarest = (batch_of(2048, 683, context, 1024.0) for context in (1280.0, 1600.0, 900.0))

    def names(run: list[tuple[BatchShape, float]]) -> list[set[str]]:
        found = search_book(profile, run, max_batch_tokens=2048, time_limit_s=30, will_be_tried=True)
        return [{plan.name for plan in each.plans} for each in found]

    (alone,), (first, second) = names([(rare, 1.0)]), names([(common, 96.6), (rare, 1.8), (rarest, 1.6)])
    assert second < alone and len(alone) == 5 == len(first) and len(second) == 3


def test_rare_batches_are_not_tried_and_keep_what_is_safe() -> None:
    (cell,) = cells_of([(batch_of(2000, 700, 1000.0, 512.0), 1.0)], max_batch_tokens=2048)
    plans = tuple(replace(sequential_plan(GRAPH, 2048), name=name) for name in ("first", "second"))
    often, nothing, last, rare, rarer = (
        FoundPlan(cell=cell, part=part, gain=gain, plans=plans if gain > 1 else ())
        for part, gain in ((0.6, 1.1), (0.2, 1.0), (0.15, 1.02), (0.03, 1.08), (0.02, 1.02))
    )
    assert divided([often, nothing, last, rare, rarer]) == ([often, last], [nothing, rare, rarer])
    assert rare.trusted.plans == plans[:1] and rarer.trusted.plans == nothing.trusted.plans == ()
    # Predictions of attention inside products are better than others.
    inside = carry_plan(GRAPH, 2048, 1024, 0.8, ("gate_up_proj",))
    good = replace(rare, gain=1.04, plans=(inside, *plans))
    assert good.trusted.plans == (inside,) and replace(good, plans=plans).trusted.plans == ()
    parted = ping_pong_plan(GRAPH, 2048, 1024, Mechanism.PARTITION, share=0.75)
    assert least_predicted_gain(inside) == 1.03 < least_predicted_gain(parted) == least_predicted_gain(plans[0])


def test_cells_hold_batches_that_are_alike() -> None:
    short, longer, larger = (
        batch_of(*batch, 512.0) for batch in ((600, 600, 500.0), (600, 600, 900.0), (2048, 600, 500.0))
    )
    prompts = batch_of(2048, 0, 0.0, 512.0)
    run = [(short, 1.0), (short, 1.0), (longer, 5.0), (larger, 3.0), (prompts, 9.0)]
    cells = cells_of(run, max_batch_tokens=2048)
    assert [(cell.time_s, cell.max_tokens) for cell in cells] == [(5.0, 640), (3.0, 2048), (2.0, 640)], (
        "most time first"
    )
    assert [cell.decode_context[0] for cell in cells] == [900.0, 500.0, 500.0]
    assert cells[1].decode_share == (600 / 2048, 600 / 2048) and cells[1].min_tokens == 2048
    middle = cells[0].median_batch
    assert middle.num_tokens == 640 and middle.num_decode_tokens == 640 and middle.decode_context == 640 * 900


def test_plans_are_ranked_by_what_they_win_in_a_cell() -> None:
    (cell,) = cells_of([(batch_of(2000, 700, 1000.0, 512.0), 1.0)], max_batch_tokens=2048)
    plans = [replace(sequential_plan(GRAPH, 2048), name=name, lanes=LANES) for name in ("slow", "fast")]
    others = [sequential_plan(GRAPH, 2048), replace(plans[1], num_tokens=1024)]

    def predict(shape: BatchShape, plan: PipelinePlan | None) -> float:
        return 1.0 if plan is None else {"slow": 0.98, "fast": 0.95}[plan.name]

    found = ranked([*plans, *others], cell, predict)
    assert [plan.name for _, plan in found] == ["fast", "slow"]
    assert [gain for gain, _ in found] == pytest.approx([1 / 0.95, 1 / 0.98])
    entry = entry_of(found[0][1], cell)
    assert (entry.min_tokens, entry.max_tokens, entry.min_decode_share) == (2000, 2048, 0.35)
    assert entry.max_keys is not None and entry.min_keys < 350.0 < entry.max_keys < 1.13 * entry.min_keys + 8


def test_a_batch_belongs_to_one_cell_and_is_served_by_its_plan() -> None:
    """Many decodes of short contexts and few of long ones: ranges of shares and of contexts overlap, keys do not."""
    run = [
        (batch_of(2048, num_decodes, context, 512.0), 1.0)
        for num_decodes in range(40, 1200, 40)
        for context in range(200, 2200, 200)
    ]
    cells = cells_of(run, max_batch_tokens=2048)
    plans = {place: replace(sequential_plan(GRAPH, 2048), name=str(place)) for place in range(len(cells))}
    book = StoredBook(entries=tuple(entry_of(plans[place], cell) for place, cell in enumerate(cells)))
    for shape, _ in run:
        fitting = [entry.plan.name for entry in book.entries if entry.fits(shape)]
        keys = shape.decode_context / 2048
        assert fitting == [str(place) for place, cell in enumerate(cells) if cell.keys[0] <= keys <= cell.keys[1]]
        assert len(fitting) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decodes", "5000"], "decodes must be from 0 to max_batch_tokens (2048), got 5000"),
        (["--context", "0"], "context must be positive"),
        (["--decodes", "5", "--measure"], "--measure is for plan books"),
        (["--measure"], "is an estimate"),
        (["--workloads", "512"], "workload must be IN/OUT"),
        (["--margin", "101"], "margin must be from 0 to 100 percent, got 101.0"),
        (["--margin", "3", "--decodes", "5"], "margin is for plan books"),
        (["--time-limit", "0"], "time_limit must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(
    profile: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(profile), "-o", str(tmp_path / "plan.json"), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_profile_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text("{}", encoding="utf-8")
    assert main(["search", str(tmp_path / "p.json"), "-o", str(tmp_path / "plan.json")]) == 1
    assert "not a profile" in capsys.readouterr().err


def test_a_missing_folder_is_said_before_the_search(profile: Path, tmp_path: Path) -> None:
    assert main(["search", str(profile), "-o", str(tmp_path / "none" / "plan.json")]) == 1


def test_the_stored_book_of_one_h200_fits_its_profile(capsys: pytest.CaptureFixture[str]) -> None:
    """The committed plans still validate against the graph of the committed profile."""
    command = ["simulate", str(RESULTS / "profile_llama-3-8b_h200.json"), "--batch", "2048", "--decodes", "683"]
    book = RESULTS / "plans_llama-3-8b_h200_1024-512.json"
    assert main([*command, "--context", "1280", "--plan", str(book)]) == 0
    assert "inside 0.75 in gate_up_proj, down_proj, 2 nano-batches at 1024" in capsys.readouterr().out
