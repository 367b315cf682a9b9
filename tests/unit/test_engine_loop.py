"""What the engine learns from its iterations."""

from __future__ import annotations

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
from nanoflow.engine.front_ends import FrontEnds
from nanoflow.engine.iteration_times import IterationTimes
from nanoflow.engine.messages import Add, FromEngine, StepOutput
from nanoflow.engine.process import _Loop
from nanoflow.engine.wire import Unreadable, decode_to_engine, encode
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.outputs import FinishReason
from nanoflow.plan.book import PlanBook
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.plan.sequential import sequential_plan
from nanoflow.request import Request, RequestError, SamplingParams
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.scheduler import Scheduler
from tests.fake_engine import FakeEngine, fake_facts
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
    stats = engine.stats()
    assert (stats.iteration, stats.iterations_s, stats.latest_plan) == (3, 30.0, engine._book.fallback.digest)
    assert stats.plan_digest is None, "that is of an iteration alone"


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


class PostBox:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, FromEngine]] = []

    def send(self, front_end: int, message: FromEngine) -> None:
        self.sent.append((front_end, message))


def _taken(message: Any, engine: Any) -> PostBox:
    box, front_ends = PostBox(), FrontEnds()
    for front_end in (0, 3):
        front_ends.join(front_end)
    _Loop(engine=engine, channel=box, front_ends=front_ends)._take(3, message)  # type: ignore[arg-type]
    return box


def _request(number: int, **params: Any) -> Request:
    chosen = SamplingParams(**params)
    return Request(request_id=number, prompt_token_ids=[5], params=chosen, seed=0, max_tokens=4)


def _bent(request: Request, **fields: Any) -> Request:
    """With parameters that no door lets in."""
    for name, value in fields.items():
        object.__setattr__(request.params, name, value)
    return request


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 2.5}, {"stop_token_ids": ["x"]}, {"n": "many"}, {"temperature": -7.0}, {"logit_bias": {5: "much"}}],
)
def test_an_add_that_cannot_be_read_ends_its_requests_alone(fields: dict[str, Any]) -> None:
    message = decode_to_engine(encode(Add.of([_bent(_request(7), **fields), _request(8)])))
    assert isinstance(message, Unreadable) and message.request_ids == [7, 8]
    engine = FakeEngine()
    ((front_end, refusal),) = _taken(message, engine).sent
    assert isinstance(refusal, StepOutput) and front_end == 3 and not engine.has_work
    assert sorted(refusal.finished) == [7, 8]
    assert all(
        end.reason is FinishReason.ERROR and "cannot be read" in str(end.error) for end in refusal.finished.values()
    )


@pytest.mark.parametrize("error", [RequestError("no\nmore"), TypeError("no"), OverflowError("no")])
def test_whatever_is_wrong_with_a_request_refuses_it_alone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    take = engine.add

    def add(request: Request) -> None:
        if request.request_id % 16 == 7:
            raise error
        take(request)

    monkeypatch.setattr(engine, "add", add)
    ((front_end, refusal),) = _taken(Add.of([_request(7), _request(9)]), engine).sent
    assert isinstance(refusal, StepOutput)
    assert (front_end, refusal.finished[7].error, list(refusal.finished)) == (3, "no", [7])
    assert engine.has_work
