"""`nanoflow search`: from a profile to a plan or a plan book, in words and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.cli.main import main
from nanoflow.plan.book import load_book
from nanoflow.plan.plan import PipelinePlan
from nanoflow.search.shapes import workload_shapes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "a100.json"
    assert main(["profile", "preset:llama-3-8b", "-o", str(path), "--estimate", "a100-80"]) == 0
    return path


def test_one_batch_gives_one_plan(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    options = ["--workload", "256/512", "--max-batch-tokens", "512", "--max-num-seqs", "256", "--quiet"]
    assert main(["search", str(profile), "-o", str(path), *options]) == 0
    book = load_book(path)
    assert book.made_for is not None and book.made_for.gpu == "NVIDIA A100 80 GB SXM"
    assert f"{len(book.entries)} plans" in capsys.readouterr().out
    for entry in book.entries:
        assert entry.max_tokens == entry.plan.num_tokens and entry.min_tokens >= 7 / 8 * entry.max_tokens


def test_shapes_of_a_workload() -> None:
    shapes = list(workload_shapes(512.0, 512.0, max_batch_tokens=2048, max_num_seqs=600))
    assert [(s.shape.num_tokens, s.shape.num_decode_tokens) for s in shapes] == [(2048, 600), (600, 600), (300, 300)]
    assert shapes[0].shape.decode_context == 600 * 768 and shapes[0].shape.prefill_context == 1448 * 513 // 2
    assert shapes[0].min_decode_share < 600 / 2048 < shapes[0].max_decode_share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decodes", "5000"], "decodes must be from 0 to max_batch_tokens (2048), got 5000"),
        (["--context", "5"], "context needs --decodes"),
        (["--workload", "512"], "workload must be IN/OUT tokens"),
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
    assert "partition, 2 nano-batches at 1024" in capsys.readouterr().out
