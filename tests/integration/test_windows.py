"""Contexts many times as long as a sliding window: pages behind the window go to others, and the tokens stay the same.

What stands in free pages is made NaN before a batch runs, so a kernel that lets such a key or value matter shows it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.batch import DenseBatch
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.engine.messages import EngineStats
from nanoflow.kvcache.sizes import Demand
from nanoflow.kvcache.tables import PageTables
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.scheduler.gain import Gain
from tests.driving import HuggingFace, Prompt, Run, expect_less, greedy, run_engine
from tests.families import SLIDING_WINDOW, make_model

MAX_TOKENS = 30
PAGE_SIZE = 4
# Layers with a window and layers without in turn, and layers that all have a window.
FAMILIES = ("gemma3", "phi3")


def long_prompts() -> list[Prompt]:
    """Up to ten windows long, and some that repeat themselves so that they can be guessed."""
    rng = random.Random(4)
    lengths = (10 * SLIDING_WINDOW, 5, 4 * SLIDING_WINDOW + 3, SLIDING_WINDOW)
    random_ones = [[rng.randrange(4, 131) for _ in range(length)] for length in lengths]
    return [*random_ones, [20, 21, 22, 23, 24] * 20, [40, 41, 42] * 20]


PROMPTS = long_prompts()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on disk, and what transformers generates with it."""

    folder: Path
    expected: list[list[int]]

    @property
    def has_full_layers(self) -> bool:
        return None in build_graph(load(self.folder), None).windows


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = make_model(request.param, tmp_path_factory.mktemp(request.param), seed=1)
    yield Case(folder=folder, expected=HuggingFace(folder).generate(PROMPTS, MAX_TOKENS))


def spoil_free_pages(engine: Engine) -> None:
    """Before a batch runs, make NaN of whatever stands in free pages."""
    scheduler, caches = engine._scheduler, engine._worker._executor._model.caches
    schedule = scheduler.schedule
    spoilt = [torch.zeros(tables.pool.num_pages, dtype=torch.bool) for tables in scheduler._pages._groups]

    def schedule_and_spoil() -> DenseBatch | None:
        batch = schedule()
        for group, tables in enumerate(scheduler._pages._groups):
            is_free = torch.from_numpy(tables.pool.empty_mask())
            for cache in (cache for cache in caches if cache.group == group):
                cache.keys[is_free & ~spoilt[group]] = cache.values[is_free & ~spoilt[group]] = torch.nan
            spoilt[group] = is_free
        return batch

    scheduler.schedule = schedule_and_spoil  # type: ignore[method-assign]


def run(case: Case, *, is_tight: bool = False, **options: Any) -> tuple[Run, EngineStats]:
    config = {
        "max_num_seqs": 8,
        "num_threads": 1,
        "num_pages": 8 * 75,
        "max_model_len": 300,
        "max_batch_tokens": 64,
        "page_size": PAGE_SIZE,
        **options,
    }
    # Batches on their way may still read pages that have been given back, which would be spoilt too early.
    engine = build_engine(EngineConfig(model=str(case.folder), async_scheduling=False, **config))
    spoil_free_pages(engine)
    try:
        if is_tight:
            expect_less(engine, MAX_TOKENS)
        return run_engine(engine, PROMPTS, greedy(MAX_TOKENS)), engine.stats()
    finally:
        engine.close()


@pytest.mark.parametrize("max_batch_tokens", [9, 2048])
def test_tokens_are_those_of_transformers(case: Case, max_batch_tokens: int) -> None:
    assert len({tuple(tokens) for tokens in case.expected}) > 4, "the model must have something to say"
    assert run(case, max_batch_tokens=max_batch_tokens)[0].tokens == case.expected


def test_tokens_without_freeing_are_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageTables, "slide", lambda *_: None)
    monkeypatch.setattr("nanoflow.kvcache.sizes.Demand.useful_pages", lambda *_: 8 * 75)
    assert run(case)[0].tokens == case.expected


def test_batches_one_ahead_give_the_same_tokens(case: Case) -> None:
    """Pages change hands while a batch that reads them is on its way."""
    engine = build_engine(
        EngineConfig(
            model=str(case.folder),
            max_num_seqs=8,
            num_threads=1,
            num_pages=100,
            max_model_len=300,
            page_size=PAGE_SIZE,
            max_batch_tokens=32,
        )
    )
    try:
        assert run_engine(engine, PROMPTS, greedy(MAX_TOKENS)).tokens == case.expected
    finally:
        engine.close()


def test_tokens_under_preemption(case: Case) -> None:
    """The pool has room for the longest request, and not for all that are let in, unless all layers have a window."""
    num_pages = 76 if case.has_full_layers else SLIDING_WINDOW // PAGE_SIZE + 7
    result, _ = run(case, is_tight=True, num_pages=num_pages, max_batch_tokens=16)
    assert result.tokens == case.expected
    assert result.num_preemptions > 0 or not case.has_full_layers


def test_tokens_under_a_nano_batched_plan(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(nanobatch_plan(build_graph(load(case.folder), None), 64, [13, 40]).to_json())
    assert run(case, plan=str(path))[0].tokens == case.expected


def test_tokens_with_drafts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "allows", lambda *_: True)
    result, stats = run(case, speculative="ngram:4:3:1")
    assert result.tokens == case.expected
    assert stats.num_draft_tokens - stats.num_accepted_tokens > 10, "some must be taken back"


def test_only_freeing_makes_it_fit(case: Case) -> None:
    """In layers with a window the pool holds fewer tokens than the longest request has."""
    num_pages = 76 if case.has_full_layers else 30
    assert run(case, num_pages=num_pages, max_batch_tokens=32, max_num_seqs=2)[0].tokens == case.expected
    graph = build_graph(load(case.folder), None)
    demand = Demand(max_num_seqs=2, max_model_len=300, max_batch_tokens=32, page_size=PAGE_SIZE)
    *_, windowed = demand.bounded(num_pages, [group.window for group in graph.kv_groups])
    assert windowed.window == SLIDING_WINDOW
    assert windowed.num_pages * PAGE_SIZE < max(map(len, PROMPTS))


def test_a_pool_that_cannot_hold_a_window_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="lower max_model_len, or raise num_pages"):
        run(case, num_pages=5)
