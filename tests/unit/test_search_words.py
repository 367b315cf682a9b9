"""What `nanoflow search` says of candidates, what --margin keeps of them, and whether stored plans still win."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.cli.main import main
from nanoflow.cli.search_words import cell_line
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanEntry, load_book
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.table import Profile
from nanoflow.search.books import FoundPlan
from nanoflow.search.carry import carry_plan
from nanoflow.search.shapes import batch_of, cells_of, least_predicted_gain
from nanoflow.simulate.iteration import IterationModel
from tests.plans import ping_pong_plan

GRAPH = build_graph(preset_config("llama-3-8b"), None)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED_BOOKS = sorted((*RESULTS.glob("plans_*.json"), *(RESULTS / "ladder" / "books").glob("*.json")))


@pytest.mark.parametrize("path", STORED_BOOKS, ids=lambda path: path.stem)
def test_no_stored_plan_is_predicted_to_lose_with_the_stored_profile(path: Path) -> None:
    """Of every entry of every committed book the batch in the middle of its ranges, by the profile of its model.

    A book whose name says fp8 is for the model with weights in FP8.
    """
    book = load_book(path)
    assert book.made_for is not None
    if not book.entries:
        return
    name = book.made_for.model.removeprefix("preset:").replace("3.1-8b", "3-8b")
    stored = RESULTS / f"profile_{name}_h200{'_fp8' if '_fp8' in path.stem else ''}.json"
    model = IterationModel(Profile.load(stored))
    for entry in book.entries:
        shape = middle_of(entry)
        assert entry.fits(shape) or shape.num_tokens == entry.max_tokens
        gain = model.iteration_s(shape, None) / model.iteration_s(shape, entry.plan)
        assert gain >= 1.005, f"{entry.plan.name} is predicted at {gain:.3f}x of sequential"
    if book.prediction is not None:
        assert book.prediction.gain >= 1.005 and book.limits is not None


def middle_of(entry: PlanEntry) -> BatchShape:
    """The batch in the middle of an entry's ranges."""
    share = (entry.min_decode_share + entry.max_decode_share) / 2
    if entry.max_keys is not None:
        context = (entry.min_keys + entry.max_keys) / 2 / share
    else:
        context = (entry.min_decode_context + (entry.max_decode_context or 0)) / 2
    return batch_of(entry.max_tokens, round(share * entry.max_tokens), context, 1024.0)


def test_what_was_not_kept_is_named_with_the_reason_and_margin_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.json"
    assert main(["profile", "preset:llama-3-8b", "-o", str(profile), "--estimate", "a100-80"]) == 0
    path = tmp_path / "plans.json"
    options = ["--workloads", "64/64", "--num-requests", "512", "--max-batch-tokens", "512", "--max-num-seqs", "512"]
    command = ["search", str(profile), "-o", str(path), *options]
    capsys.readouterr()
    assert main([*command, "--margin", "99"]) == 0
    told = capsys.readouterr()
    assert not load_book(path).entries and "x: speed under a plan / under the sequential plan" in told.err
    assert "; the best candidate wins 1." in told.err and ", needs 1.990x (" in told.err
    best = re.search(r"best candidate: (1\.\d+)x, predicted, on batches of .*\(([0-9a-f]{12})\)", told.out)
    margin = re.search(r"below the margin of 99.0 % for plans without trials; .*--margin ([\d.]+) keeps it", told.out)
    assert best is not None and margin is not None
    assert float(best[1]) - 0.002 <= 1 + float(margin[1]) / 100 <= float(best[1])
    assert main([*command, "--margin", margin[1], "--quiet"]) == 0
    assert best[2] in {plan.digest for plan in load_book(path).plans}
    assert "these are predictions" in capsys.readouterr().out
    assert main([*command, "--margin", "-1"]) == 1 and "margin must be from 0 to 100" in capsys.readouterr().err


def test_a_candidate_that_loses_is_called_slower() -> None:
    (cell,) = cells_of([(batch_of(2000, 700, 1000.0, 512.0), 1.0)], max_batch_tokens=2048)
    plan = ping_pong_plan(GRAPH, 2048, 1024, Mechanism.PARTITION, share=0.75)
    lost = FoundPlan(cell=cell, part=0.5, gain=0.936, plans=(), candidate=plan)
    assert cell_line(lost).endswith(f"sequential; the best candidate is 6.4 % slower ({plan.name})")
    assert cell_line(replace(lost, gain=1.0, candidate=None)).endswith("sequential; no way to overlap can win there")
    assert cell_line(replace(lost, gain=1.05)).endswith(f"wins 1.050x, needs 1.080x ({plan.name})")
    assert cell_line(replace(lost, gain=1.1, plans=(plan,))).endswith(f"1.100x, {plan.name} ({plan.digest})")


@pytest.mark.parametrize("margin", [None, 0.0, 0.02, 0.2])
def test_a_margin_replaces_what_is_known_of_lanes(margin: float | None) -> None:
    inside = carry_plan(GRAPH, 2048, 1024, 0.8, ("gate_up_proj",))
    least = {None: 1.03, 0.0: 1.005, 0.02: 1.02, 0.2: 1.2}[margin]
    assert least_predicted_gain(inside, margin) == least
    (cell,) = cells_of([(batch_of(2000, 700, 1000.0, 512.0), 1.0)], max_batch_tokens=2048)
    found = FoundPlan(cell=cell, part=0.01, gain=least, plans=(inside,), margin=margin)
    assert found.trusted.plans and not replace(found, gain=least - 0.001).trusted.plans
