"""The collector leaves a heap alone while requests run, and nothing is changed afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.engine.engine import Engine
from nanoflow.engine.garbage import heap_left_alone


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """What is frozen while tests run is not, during each of these."""
    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    gc.unfreeze()
    if is_frozen:
        gc.freeze()


def test_a_heap_is_left_alone_until_the_end() -> None:
    with heap_left_alone():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_what_the_interpreter_has_frozen_itself_is_not_the_program_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 begins with a few hundred objects frozen."""
    frozen = gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen() or 375)
    with heap_left_alone():
        assert frozen() > 10_000
        young: list[object] = [[] for _ in range(100)]
        assert len(gc.get_objects()) < 10_000 + len(young)
    assert frozen() == 0


def test_an_error_ends_it_too() -> None:
    with pytest.raises(ValueError, match="some"), heap_left_alone():
        raise ValueError("some")
    assert gc.get_freeze_count() == 0


def test_what_a_program_has_frozen_stays_so() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with heap_left_alone():
        pass
    # What nobody refers to any more goes, frozen or not.
    assert before / 2 < gc.get_freeze_count() <= before


def test_completions_are_generated_so(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, step = [], Engine.step

    def counted(engine: Engine) -> object:
        counts.append(gc.get_freeze_count())
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    LLM("default", max_batch_tokens=64, max_num_seqs=4).generate("def ", SamplingParams(max_tokens=4))
    assert counts and all(counts) and gc.get_freeze_count() == 0
