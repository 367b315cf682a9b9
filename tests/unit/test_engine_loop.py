"""What the engine learns from its iterations."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.engine.engine import Engine
from nanoflow.engine.iteration_times import IterationTimes
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.plan.sequential import sequential_plan
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.scheduler import Scheduler
from tests.fake_engine import fake_facts
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


def _engine(times: IterationTimes) -> Engine:
    plan = sequential_plan(build_graph(preset_config("llama-3.2-1b"), None), 64)
    engine = Engine(
        facts=fake_facts(),
        scheduler=Scheduler(limits=make_limits(), pace=Pace(max_itl_s=0.05, iteration_time=times.estimate)),
        worker=SlowWorker(),  # type: ignore[arg-type]
        book=PlanBook(fallback=plan),
        is_async=True,
        times=times,
    )
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add(Request(request_id=1, prompt_token_ids=[1, 2], params=params, seed=0, max_tokens=8))
    return engine


def test_iterations_change_what_the_scheduler_expects() -> None:
    engine = _engine(IterationTimes(known=IterationTime(fixed_s=0.1)))
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
