"""`benchmarks/ladder/books.py`: the plan books of a ladder, from an estimated profile; on no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.common.rungs import read_rung
from benchmarks.ladder import books

from nanoflow.cli.main import main as nanoflow
from nanoflow.plan.book import BookLimits, StoredBook, load_book
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.table import Profile
from nanoflow.search.shapes import batch_of
from nanoflow.search.workloads import SimulatedWorkloads
from nanoflow.simulate.iteration import graphs_of
from nanoflow.workload import Lengths, under_way


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An estimated profile of the embedded model, with pairs on partitions."""
    path = tmp_path_factory.mktemp("profile") / "a100.json"
    assert nanoflow(["profile", "default", "-o", str(path), "--estimate", "a100-80", "--max-batch-tokens", "512"]) == 0
    return path


@pytest.fixture(scope="module")
def profile(path: Path) -> Profile:
    return Profile.load(path)


def _main(path: Path, folder: Path, *options: str) -> int:
    given = ("--profile", str(path), "--out", str(folder), "--limits", "512/256", "--num-requests", "60")
    return books.main([*given, "--workloads", "40/8", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "64"], "workload must be IN/OUT"),
        (["--rungs", "offload"], "there is no rung 'offload'"),
        (["--rungs", "sequential"], "there is no rung 'sequential'"),
        (["--rungs", "beside"], "the profile has no pairs of beside"),
        (["--limits", "512"], "'512' is no TOKENS/SEQS"),
    ],
)
def test_what_makes_no_sense_is_refused(
    path: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        _main(path, tmp_path, *options)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_nano_batches_cut_every_batch_of_two_tiles_or_more_in_the_middle(profile: Profile) -> None:
    graph = graphs_of(profile)[0]
    entries = list(books.nano_batches(graph, 2500))
    covered = [size for entry in entries for size in range(entry.min_tokens, entry.max_tokens + 1)]
    assert covered == list(range(256, 2501))
    for entry in entries:
        entry.plan.validate(graph)
        (cut,) = entry.plan.cuts
        assert cut % 128 == 0 and abs(cut - entry.max_tokens / 2) <= 64 and len(entry.plan.lanes) == 1
        assert entry.max_tokens - entry.min_tokens <= max(entry.max_tokens / 8, 128)
    assert list(books.nano_batches(graph, 200)) == []


@pytest.mark.parametrize("mechanism", [Mechanism.PARTITION, Mechanism.BESIDE, Mechanism.STREAM])
def test_a_mechanism_has_plans_even_where_they_lose(profile: Profile, mechanism: Mechanism) -> None:
    pairs = tuple(
        replace(pair, mechanism=mechanism, first_performance=0.3, second_performance=0.3) for pair in profile.pairs
    )
    slow = replace(profile, pairs=pairs)
    run = [(batch_of(tokens, 60, 300.0, 64.0), 1.0) for tokens in (500, 500, 500, 100)]
    (entry,) = books.entries_of(slow, mechanism.value, run, 512)
    assert {lane.mechanism for lane in entry.plan.lanes} == {Mechanism.WHOLE, mechanism}
    assert (entry.min_tokens, entry.max_tokens) == (500, 512), "100 tokens are too few to be cut"
    entry.plan.validate(graphs_of(slow)[0])
    assert list(books.entries_of(slow, "searched", run, 512)) == [], "it loses, so the search does not take it"


def test_books_of_a_ladder_are_made_once_and_say_their_limits(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(path, tmp_path) == 0
    told = capsys.readouterr()
    names = {rung: tmp_path / f"default_{rung}_512-256.json" for rung in ("nano-batches", "partition", "searched")}
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in names.values()}
    for text in told.out.split():
        rung = read_rung(text)
        assert (rung.max_batch_tokens, rung.max_num_seqs, rung.book) == (512, 256, names[rung.name])
    assert f"nano-batches={names['nano-batches']}" in told.out and f"partition={names['partition']}" in told.out
    assert load_book(names["partition"]).made_for is not None
    # A book that is there stays; one without plans is no rung.
    names["partition"].write_bytes(StoredBook(entries=()).to_json())
    assert _main(path, tmp_path, "--rungs", "partition") == 0
    told = capsys.readouterr()
    assert told.out == "" and "this rung would be sequential" in told.err


def test_plans_are_made_for_the_iterations_of_the_workload(profile: Profile) -> None:
    """All requests at once, and once more after requests under way; the last token of each is never worked on."""
    simulated = SimulatedWorkloads(profile, ["40/8"], num_requests=60, seed=0, gpu_memory_utilization=0.9)
    iterations = simulated.batches(BookLimits(max_batch_tokens=512, max_num_seqs=256))
    lengths = [Lengths(num_prompt_tokens=40, num_output_tokens=8)] * 60
    first = under_way(lengths, 1 << 30, 256, 512, 0)
    assert len(first) == -(-512 * 8 // 48)
    tokens = [
        length.num_prompt_tokens + length.num_output_tokens - 1 - length.num_computed
        for length in (*lengths, *first, *lengths)
    ]
    assert sum(shape.num_tokens for shape, _ in iterations) == sum(tokens)
