"""`nanoflow search`: from a profile to a plan or a plan book, in words and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.cli.main import main
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import load_book
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.search.shapes import batch_of, entry_of, workload_shapes

GRAPH = build_graph(preset_config("llama-3-8b"), None)
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
        assert entry.min_tokens <= entry.max_tokens == entry.plan.num_tokens


def test_shapes_of_a_workload() -> None:
    shapes = list(workload_shapes(512.0, 512.0, max_batch_tokens=2048, max_num_seqs=600))
    assert [(shape.num_tokens, shape.num_decode_tokens) for shape in shapes] == [
        *((2048, 600), (2048, 450), (2048, 300)),
        *((600, 600), (300, 300)),
    ]
    assert shapes[0].decode_context == 600 * 768 and shapes[0].prefill_context == 1448 * 513 // 2


def test_a_plan_is_used_only_where_it_wins() -> None:
    """A plan that wins from 25 to 45 % of decodes, up to 1,500 keys, from 1,500 tokens on."""
    plan = sequential_plan(GRAPH, 2048)

    def gain(shape: BatchShape) -> float:
        share = shape.num_decode_tokens / shape.num_tokens
        context = shape.decode_context / shape.num_decode_tokens
        return 1.05 if 0.25 <= share <= 0.45 and context <= 1500 and shape.num_tokens >= 1500 else 0.9

    entry = entry_of(plan, batch_of(2048, 700, 1000.0, 512.0), 512.0, gain)
    assert entry is not None and entry.max_decode_context is not None
    assert 1500 < entry.min_tokens < entry.max_tokens == 2048
    assert 0.25 < entry.min_decode_share < 700 / 2048 < entry.max_decode_share < 0.45
    assert entry.min_decode_context < 1000 < entry.max_decode_context < 1500
    assert entry_of(plan, batch_of(2048, 300, 1000.0, 512.0), 512.0, gain) is None


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
