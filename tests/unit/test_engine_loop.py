"""When the next batch is formed: late enough that requests which come while the device works can join it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.engine.iteration_times import IterationTimes
from nanoflow.engine.messages import Abort, Add, EngineStats, StepOutput
from nanoflow.engine.process import _Loop
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.plan.sequential import sequential_plan
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.scheduler import Scheduler
from tests.fake_engine import fake_facts
from tests.toy_models import ENGINE_OPTIONS, write_toy_model
from tests.unit.test_scheduler import make_limits


class SlowWorker:
    """Takes a fixed time for every batch."""

    num_prepared = 0

    def __init__(self) -> None:
        self.pending: list[tuple[DenseBatch, Future[SampledTokens]]] = []

    def launch(self, batch: DenseBatch, _plan: object) -> Future[SampledTokens]:
        result: Future[SampledTokens] = Future()
        result.set_result(SampledTokens(token_ids=np.ones(len(batch.sampled), np.int32)))
        self.pending.append((batch, result))
        return result


def _constant(time_s: float) -> IterationTimes:
    """Every iteration takes so long, as far as is known at first."""
    times = IterationTimes()
    times.estimate = IterationTime(fixed_s=time_s)
    return times


def _engine(times: IterationTimes | None, *, is_async: bool = True) -> Engine:
    plan = sequential_plan(build_graph(preset_config("llama-3.2-1b"), None), 64)
    estimate = None if times is None else times.estimate
    engine = Engine(
        facts=fake_facts(),
        scheduler=Scheduler(limits=make_limits(), pace=Pace(max_itl_s=0.05, iteration_time=estimate)),
        worker=SlowWorker(),  # type: ignore[arg-type]
        book=PlanBook(fallback=plan),
        is_async=is_async,
        times=times,
    )
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add(Request(request_id=1, prompt_token_ids=[1, 2], params=params, seed=0, max_tokens=8))
    return engine


def test_a_long_iteration_leaves_time_for_requests_to_come() -> None:
    engine = _engine(_constant(0.1))
    assert engine.slack_s == 0.0  # nothing runs
    engine.step()
    assert 0.05 < engine.slack_s < 0.1
    time.sleep(0.03)
    assert engine.slack_s < 0.05


@pytest.mark.parametrize("fixed_s", [None, 0.004])
def test_there_is_none_without_an_estimate_and_in_short_iterations(fixed_s: float | None) -> None:
    engine = _engine(None if fixed_s is None else _constant(fixed_s))
    engine.step()
    assert engine.slack_s == 0.0


def test_there_is_none_when_no_batch_runs_ahead() -> None:
    engine = _engine(_constant(0.1), is_async=False)
    engine.step()
    assert engine.slack_s == 0.0


def test_iterations_change_what_the_scheduler_expects() -> None:
    engine = _engine(_constant(0.1))
    for place in range(2, 120):
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        engine.add(Request(request_id=place, prompt_token_ids=[1, 2], params=params, seed=0, max_tokens=8))
    while engine.has_work:
        engine.step()
    estimate = engine._scheduler.pace.iteration_time
    assert estimate is not None and estimate.predict_s(_shape(engine)) < 0.05


def _shape(engine: Engine) -> Any:
    worker = engine._worker
    assert isinstance(worker, SlowWorker)
    return worker.pending[-1][0].shape


class WatchedResult(Future[SampledTokens]):
    """Says when it is read."""

    def __init__(self, number: int, happened: list[tuple[str, int]]) -> None:
        super().__init__()
        self._number, self._happened = number, happened

    def result(self, timeout: float | None = None) -> SampledTokens:
        self._happened.append(("read", self._number))
        return super().result(timeout)


class WatchedWorker:
    """Notes in which order batches are launched and their tokens read."""

    num_prepared = 0

    def __init__(self) -> None:
        self.happened: list[tuple[str, int]] = []
        self._num_launched = 0

    def launch(self, batch: DenseBatch, _plan: object) -> Future[SampledTokens]:
        self.happened.append(("launch", self._num_launched))
        result = WatchedResult(self._num_launched, self.happened)
        result.set_result(SampledTokens(token_ids=np.ones(len(batch.sampled), np.int32)))
        self._num_launched += 1
        return result


@pytest.mark.parametrize("is_async", [True, False])
def test_a_batch_is_launched_before_the_tokens_of_the_one_before_are_read(is_async: bool) -> None:
    engine, worker = _engine(None, is_async=is_async), WatchedWorker()
    engine._worker = worker  # type: ignore[assignment]
    while engine.has_work:
        engine.step()
    count = len(worker.happened) // 2
    assert count >= 8
    if is_async:
        middle = [event for i in range(count - 1) for event in (("launch", i + 1), ("read", i))]
        assert worker.happened == [("launch", 0), *middle, ("read", count - 1)]
    else:
        assert worker.happened == [(what, i) for i in range(count) for what in ("launch", "read")]


class NotedTimes:
    """Keeps what it is told."""

    estimate = None

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def observe(self, _shape: object, time_s: float) -> bool:
        self.times_s.append(time_s)
        return False


def test_an_iteration_begins_when_the_one_before_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it was launched earlier; the first begins with its launch."""
    engine, times = _engine(None), NotedTimes()
    engine._worker = WatchedWorker()  # type: ignore[assignment]
    engine._times = times  # type: ignore[assignment]
    # Launch, launch, end, launch, end, ...: ten seconds each.
    clock = iter([1.0, 2.0, 11.0, 12.0, 21.0, 22.0, 31.0])
    monkeypatch.setattr("nanoflow.engine.engine.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for _ in range(4):
        engine.step()
    assert times.times_s == [10.0, 10.0, 10.0]


def test_tokens_of_prompts_are_counted_apart() -> None:
    engine, seen = _engine(None, is_async=False), []
    while engine.has_work:
        stats = engine.step().stats
        seen.append((stats.iteration, stats.iteration_tokens, stats.prefill_tokens))
    assert seen == [(1, 2, 2), *((count, 1, 0) for count in range(2, 9))]


@pytest.mark.parametrize("is_async", [True, False])
def test_the_option_decides_whether_the_first_step_waits_for_its_tokens(is_async: bool, tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_toy_model(tmp_path)), async_scheduling=is_async, **ENGINE_OPTIONS)
    engine = build_engine(config)
    try:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        engine.add(Request(request_id=1, prompt_token_ids=[1, 2], params=params, seed=0, max_tokens=2))
        assert engine.step().request_ids == ([] if is_async else [1])
    finally:
        engine.close()


def test_scheduling_is_asynchronous_unless_told_otherwise() -> None:
    assert EngineConfig().async_scheduling


class LateChannel:
    """Messages that come one after the other, each when it is waited for."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages

    def receive(self, timeout_s: float) -> list[tuple[int, Any]]:
        if timeout_s > 0 and self.messages:
            time.sleep(0.002)
            return [(0, self.messages.pop(0))]
        time.sleep(timeout_s)
        return []


class SlackEngine:
    """Has time before its next step."""

    facts = fake_facts()
    has_work = True
    slack_s = 0.05

    def stats(self) -> EngineStats:
        return EngineStats()

    def step(self) -> StepOutput:
        return StepOutput()


def test_all_that_come_in_time_are_taken_before_the_next_step() -> None:
    messages: list[Any] = [Add(requests=[]), Abort(request_ids=[1]), Add(requests=[])]
    channel = LateChannel(list(messages))
    loop = _Loop(engine=SlackEngine(), channel=channel, front_ends=None)  # type: ignore[arg-type]
    assert loop._gather() == [(0, message) for message in messages]
    assert loop._gather() == []
