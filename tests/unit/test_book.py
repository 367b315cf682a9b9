"""Plan books: which plan they choose, how a file says it, and what is refused with the culprit named."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.engine.own_book import book_facts, plan_book, warn_of_another
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import (
    BookLimits,
    BookPrediction,
    MadeFor,
    PlanBook,
    PlanEntry,
    StoredBook,
    WorkloadPrediction,
    load_book,
)
from nanoflow.plan.plan import PipelinePlan, PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan

GRAPH = build_graph(preset_config("llama-3.2-1b"), None)
BUDGET = 256
FALLBACK = sequential_plan(GRAPH, BUDGET)
CPU = torch.device("cpu")


def plan_of(num_tokens: int, name: str = "halves", graph: OpGraph = GRAPH) -> PipelinePlan:
    return nanobatch_plan(graph, num_tokens, [num_tokens // 2] if num_tokens > 1 else [], name=name)


def entry_of(
    min_tokens: int, max_tokens: int, name: str = "halves", plan_tokens: int | None = None, **ranges: float
) -> PlanEntry:
    plan = plan_of(plan_tokens or max_tokens, name)
    return PlanEntry(plan=plan, min_tokens=min_tokens, max_tokens=max_tokens, **ranges)


def book_of(*entries: PlanEntry) -> PlanBook:
    return PlanBook(fallback=FALLBACK, entries=entries)


def shape_of(num_tokens: int, num_decodes: int = 0, context: float = 0.0) -> BatchShape:
    return BatchShape(num_tokens=num_tokens, num_decode_tokens=num_decodes, decode_context=round(num_decodes * context))


# --- choosing --------------------------------------------------------------------------------------------------------


@st.composite
def entries(draw: st.DrawFn) -> PlanEntry:
    tokens = sorted(draw(st.tuples(st.integers(1, BUDGET), st.integers(1, BUDGET))))
    shares = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    contexts = sorted(draw(st.tuples(st.floats(0, 100), st.floats(0, 100))))
    keys = sorted(draw(st.tuples(st.floats(0, 100), st.floats(0, 100))))
    return PlanEntry(
        plan=plan_of(draw(st.integers(tokens[1], BUDGET)), name=draw(st.sampled_from("abc"))),
        min_tokens=tokens[0],
        max_tokens=tokens[1],
        min_decode_share=shares[0],
        max_decode_share=shares[1],
        min_decode_context=contexts[0],
        max_decode_context=draw(st.sampled_from([contexts[1], None])),
        min_keys=draw(st.sampled_from([keys[0], 0.0])),
        max_keys=draw(st.sampled_from([keys[1], None])),
    )


@st.composite
def shapes(draw: st.DrawFn) -> BatchShape:
    num_tokens = draw(st.integers(1, BUDGET))
    num_decodes = draw(st.integers(0, num_tokens))
    return BatchShape(
        num_tokens=num_tokens,
        num_decode_tokens=num_decodes,
        decode_context=draw(st.integers(num_decodes, 100 * num_decodes)),
    )


def is_meant(entry: PlanEntry, shape: BatchShape) -> bool:
    """The rule, spelled out."""
    context = shape.decode_context / shape.num_decode_tokens if shape.num_decode_tokens else 0
    most = float("inf") if entry.max_decode_context is None else entry.max_decode_context
    return all(
        (
            entry.min_tokens <= shape.num_tokens <= entry.max_tokens,
            entry.min_decode_share <= shape.num_decode_tokens / shape.num_tokens <= entry.max_decode_share,
            entry.min_decode_context <= context <= most,
            entry.min_keys <= shape.decode_context / shape.num_tokens,
            entry.max_keys is None or shape.decode_context / shape.num_tokens <= entry.max_keys,
        )
    )


@settings(max_examples=200, deadline=None)
@given(drawn=st.lists(entries(), max_size=5), shape=shapes())
def test_the_first_entry_that_fits_is_chosen_and_has_room(drawn: list[PlanEntry], shape: BatchShape) -> None:
    chosen = book_of(*drawn).choose(shape)
    assert chosen.num_tokens >= shape.num_tokens
    assert chosen is next((entry.plan for entry in drawn if is_meant(entry, shape)), FALLBACK)


def names(book: PlanBook, shapes: Iterable[BatchShape]) -> list[str]:
    return [book.choose(shape).name for shape in shapes]


def test_both_ends_of_the_sizes_are_included() -> None:
    book = book_of(entry_of(32, 64))
    assert names(book, map(shape_of, (31, 32, 64, 65))) == ["sequential", "halves", "halves", "sequential"]


def test_the_decode_share_decides() -> None:
    book = book_of(entry_of(1, 100, min_decode_share=0.29, max_decode_share=0.58))
    chosen = names(book, (shape_of(100, decodes, 9) for decodes in (28, 29, 58, 59)))
    assert chosen == ["sequential", "halves", "halves", "sequential"]


def test_the_mean_decode_context_decides() -> None:
    book = book_of(entry_of(1, 100, min_decode_context=10, max_decode_context=20))
    chosen = names(book, (shape_of(100, 10, context) for context in (9.9, 10, 20, 20.1)))
    assert chosen == ["sequential", "halves", "halves", "sequential"]
    assert names(book, [shape_of(100)]) == ["sequential"], "no decodes: no context"
    assert names(book_of(entry_of(1, 100, max_decode_context=20)), [shape_of(100)]) == ["halves"]


def test_the_keys_a_token_decide() -> None:
    book = book_of(entry_of(1, 100, min_keys=10, max_keys=20))
    chosen = names(book, (shape_of(100, decodes, 100) for decodes in (9, 10, 20, 21)))
    assert chosen == ["sequential", "halves", "halves", "sequential"]


def test_entries_may_overlap_and_the_first_wins() -> None:
    book = book_of(entry_of(10, 20, "first"), entry_of(15, 64, "second"))
    assert names(book, map(shape_of, (14, 20, 21))) == ["first", "first", "second"]


def test_a_plan_of_two_entries_is_there_once() -> None:
    book = book_of(entry_of(1, 8, plan_tokens=64), entry_of(32, 64))
    assert [plan.name for plan in book.plans] == ["sequential", "halves"]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"max_tokens": 65}, "plan 'halves' is for 64 tokens, not for 65"),
        ({"min_tokens": 0}, "no batch has 0 to 64 tokens"),
        ({"min_tokens": 64, "max_tokens": 32}, "no batch has 64 to 32 tokens"),
        ({"min_decode_share": 0.6, "max_decode_share": 0.5}, "no batch has a decode share of 0.6 to 0.5"),
        ({"max_decode_share": 1.5}, "decode share of 0 to 1.5"),
        ({"min_decode_context": 9.0, "max_decode_context": 8.0}, "no batch has a mean decode context of 9 to 8"),
        ({"min_decode_context": -1.0}, "mean decode context of -1"),
        ({"min_keys": 9.0, "max_keys": 8.0}, "no batch has keys a token of 9 to 8"),
    ],
)
def test_an_impossible_entry_is_refused(ranges: dict[str, float], message: str) -> None:
    values = {"min_tokens": 1, "max_tokens": 64, **ranges}
    with pytest.raises(PlanError, match=re.escape(message)):
        PlanEntry(plan=plan_of(64), **values)  # type: ignore[arg-type]
    document = {"version": 1, "entries": [{"plan": msgspec.to_builtins(plan_of(64)), **values}]}
    with pytest.raises(PlanError, match=re.escape(message) + r".*\$\.entries\[0\]"):
        StoredBook.from_json(msgspec.json.encode(document))


# --- files -----------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, document: bytes) -> Path:
    path = tmp_path / "book.json"
    path.write_bytes(document)
    return path


@settings(max_examples=30, deadline=None)
@given(drawn=st.lists(entries(), max_size=3), gpu=st.text(max_size=5) | st.none())
def test_json_round_trip(drawn: list[PlanEntry], gpu: str | None) -> None:
    made_for = None if gpu is None else MadeFor(model="preset:x", gpu=gpu, num_gpus=2)
    stored = StoredBook(entries=tuple(drawn), made_for=made_for)
    again = StoredBook.from_json(stored.to_json())
    assert again == stored
    assert again.digest == stored.digest == book_of(*drawn).digest


def test_the_digest_follows_entries_and_not_the_budget() -> None:
    entry = entry_of(8, 64)
    book = book_of(entry)
    assert dataclasses.replace(book, fallback=sequential_plan(GRAPH, 99)).digest == book.digest
    assert book_of(dataclasses.replace(entry, min_tokens=9)).digest != book.digest


def test_a_file_with_a_single_plan_is_a_book_of_one(tmp_path: Path) -> None:
    stored = load_book(write(tmp_path, plan_of(64).to_json()))
    assert stored == StoredBook(entries=(entry_of(1, 64),))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "neither a pipeline plan nor a plan book"),
        (b"\xff", "neither a pipeline plan nor a plan book"),
        (b'{"entries": "\xff"}', "neither a pipeline plan nor a plan book"),
        (b"[1]", "neither a pipeline plan (which has nano_operations) nor a plan book (entries)"),
        (b'{"points": []}', "neither a pipeline plan (which has nano_operations) nor a plan book (entries)"),
        (b'{"entries": [{}], "version": 1}', "missing required field `plan` - at `$.entries[0]`"),
        (b'{"nano_operations": []}', "missing required field `name`"),
        (b'{"entries": [], "version": 7}', "the plan book has version 7, this nanoflow reads 1"),
        (b'{"entries": []}', "the plan book has version None, this nanoflow reads 1"),
    ],
)
def test_a_file_without_a_book_is_refused(document: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, document)
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        load_book(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("mechanism", ["\U0001f600" * 4000, "a\nb" * 4000])
@pytest.mark.parametrize("load", [PipelinePlan.from_json, StoredBook.from_json])
def test_a_refusal_quotes_little_of_a_long_value(load: Callable[[bytes], object], mechanism: str) -> None:
    document = msgspec.json.decode(plan_of(64).to_json())
    document["lanes"][0]["mechanism"] = mechanism
    with pytest.raises(PlanError) as caught:
        load(msgspec.json.encode(document))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read plan .*nowhere\.json: No such file"):
        load_book(tmp_path / "nowhere.json")


# --- for an engine ---------------------------------------------------------------------------------------------------


def load_for_engine(path: Path, graph: OpGraph = GRAPH) -> PlanBook:
    return plan_book(str(path), load_book(path), BUDGET, graph)


def test_without_a_file_there_is_the_sequential_plan() -> None:
    book = plan_book(None, None, BUDGET, GRAPH)
    assert book == book_of()
    assert str(book_facts(book)) == f"sequential ({FALLBACK.digest})"


def test_a_book_gets_the_sequential_plan_of_the_budget(tmp_path: Path) -> None:
    stored = StoredBook(entries=(entry_of(8, 64), entry_of(128, BUDGET, "large")))
    book = load_for_engine(write(tmp_path, stored.to_json()))
    assert book == book_of(*stored.entries)
    assert str(book_facts(book)) == f"book ({stored.digest}) of 2 plans"
    alone = load_for_engine(write(tmp_path, plan_of(64).to_json()))
    assert str(book_facts(alone)) == f"halves ({plan_of(64).digest})"


def test_an_entry_beyond_the_token_budget_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, plan_of(BUDGET + 1).to_json())
    wanted = "up to 257 tokens, the token budget is 256: set --max-batch-tokens to at least 257"
    with pytest.raises(PlanError, match=wanted):
        load_for_engine(path)
    fitting = StoredBook(entries=(entry_of(8, BUDGET, plan_tokens=BUDGET + 1),))
    assert load_for_engine(write(tmp_path, fitting.to_json())).entries == fitting.entries


@pytest.mark.parametrize("is_fused_here", [True, False])
def test_a_plan_for_the_other_form_of_the_model_says_what_to_do(is_fused_here: bool, tmp_path: Path) -> None:
    fused = fuse_swiglu(GRAPH)
    assert len(fused.layer) == len(GRAPH.layer) - 1
    here, there, whose = (fused, GRAPH, "plan") if is_fused_here else (GRAPH, fused, "model")
    path = write(tmp_path, plan_of(64, graph=there).to_json())
    wanted = rf"book\.json: plan 'halves' .*\(the {whose} alone has activation\).*search again from a profile"
    with pytest.raises(PlanError, match=wanted):
        load_for_engine(path, here)
    assert load_for_engine(path, there).choose(shape_of(64)).name == "halves"


def test_an_invalid_plan_is_named_with_its_file(tmp_path: Path) -> None:
    plan = plan_of(64, "backwards")
    backwards = dataclasses.replace(plan, nano_operations=plan.nano_operations[::-1])
    stored = StoredBook(
        entries=(entry_of(1, 8, "good"), PlanEntry(plan=backwards, min_tokens=9, max_tokens=64)),
    )
    with pytest.raises(PlanError, match=r"book\.json: plan 'backwards': .* is issued before"):
        load_for_engine(write(tmp_path, stored.to_json()))


@pytest.mark.parametrize(("gpu", "num_gpus", "is_warned"), [("cpu", 1, False), ("cpu", 2, True), ("H200", 1, True)])
def test_another_gpu_is_warned_of(
    gpu: str, num_gpus: int, is_warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made_for = MadeFor(model="preset:llama-3.2-1b", gpu=gpu, num_gpus=num_gpus)
    path = write(tmp_path, StoredBook(entries=(entry_of(8, 64),), made_for=made_for).to_json())
    with caplog.at_level(logging.WARNING):
        warn_of_another(str(path), load_book(path), made_for.model, CPU)
    wanted = [f"{path} is for {num_gpus} x {gpu} and runs on 1 x cpu: its plans may be slow"] if is_warned else []
    assert caplog.messages == wanted


def test_the_gain_over_several_workloads_is_their_geometric_mean() -> None:
    limits = BookLimits(max_batch_tokens=64, max_num_seqs=8)
    workloads = tuple(
        WorkloadPrediction(workload="w", num_requests=1, sequential_tokens_per_s=100.0, tokens_per_s=each)
        for each in (144.0, 100.0)
    )
    assert BookPrediction(sequential_limits=limits, workloads=workloads).gain == pytest.approx(1.2)
    assert BookPrediction(sequential_limits=limits, workloads=workloads[:1]).gain == pytest.approx(1.44)
