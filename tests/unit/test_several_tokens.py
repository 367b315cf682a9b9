"""Several tokens of a request in one iteration, on their way from the engine to who reads and counts them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.batch import SampledTokens, TopLogprobs
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.front_ends import FrontEnds, split
from nanoflow.engine.logprobs import sampled_logprobs
from nanoflow.engine.messages import EngineStats, PlaceLogprobs, StepOutput
from nanoflow.request import Request
from nanoflow.scheduler.gain import Gain
from nanoflow.server.lasting import LastingEngine
from nanoflow.server.metrics import ServerMetrics
from tests.driving import greedy
from tests.fake_async_engine import FakeAsyncEngine
from tests.toy_models import ENGINE_OPTIONS, write_toy_model
from tests.unit.test_front_ends import owned
from tests.unit.test_output import TOKENIZER, Recorder, add, make_processor


def test_a_stop_string_amid_the_tokens_of_a_step_ends_the_completion_there() -> None:
    processor, recorder = make_processor(), Recorder()
    processor.observer = recorder
    output, (request,) = add(processor, "x", stop=["wor"], logprobs=0, max_tokens=100)
    token_ids = TOKENIZER.encode("hello world, this")
    count = next(n for n in range(1, len(token_ids)) if "wor" in TOKENIZER.decode(token_ids[:n]))
    scores = PlaceLogprobs(
        first_position=0,
        token_ids=[[token_id] for token_id in token_ids],
        logprobs=[[-1.0]] * len(token_ids),
        ranks=[1] * len(token_ids),
    )
    ids = [request.request_id] * len(token_ids)
    processor.process(StepOutput(request_ids=ids, token_ids=token_ids, logprobs={request.request_id: scores}))
    (completion,) = output.outputs
    assert completion.text == "hello " and completion.token_ids == token_ids[:count]
    assert completion.logprobs is not None and len(completion.logprobs) == count
    assert completion.cumulative_logprob == -count and recorder.num_tokens == count < len(token_ids)
    assert processor.num_generated_tokens == count
    assert processor.take_stopped() == [request.request_id]


def test_each_token_of_a_request_has_its_own_place_with_log_probabilities() -> None:
    result = SampledTokens(
        token_ids=np.array([5, 6, 7, 8], np.int32),
        logprob_places=[(0, 1), (1, 1), (3, 0)],
        logprobs=TopLogprobs(
            token_ids=np.array([[5, 1], [6, 2], [8, 3]], np.int32),
            logprobs=np.array([[-1, -2], [-3, -4], [-5, -6]], np.float32),
            ranks=np.array([1, 2, 3], np.int32),
        ),
    )
    found = sampled_logprobs(result, {0: 40, 1: 40, 2: 41, 3: 42})
    assert {request_id: (places.token_ids, places.ranks) for request_id, places in found.items()} == {
        40: ([[5, 1], [6, 2]], [1, 2]),
        42: ([[8]], [3]),
    }
    # A draw that does not count has none.
    assert sampled_logprobs(result, {0: 40})[40].logprobs == [[-1.0, -2.0]]


def test_each_front_end_gets_the_tokens_of_its_requests_in_order() -> None:
    ids = owned(FrontEnds(), 2, 2)
    request_ids = [ids[1, 0], ids[1, 0], ids[0, 1], ids[1, 1], ids[1, 1], ids[1, 1]]
    stats = EngineStats(iteration_tokens=9, rejected_tokens=3)
    parts = split(StepOutput(request_ids=request_ids, token_ids=[1, 2, 3, 4, 5, 6], stats=stats))
    assert (parts[1].request_ids, parts[1].token_ids) == ([0, 0, 1, 1, 1], [1, 2, 4, 5, 6])
    assert (parts[0].request_ids, parts[0].token_ids) == ([1], [3])
    assert [part.stats.rejected_tokens for part in parts.values()] == [3, 0]


@pytest.mark.parametrize("is_async", [False, True])
def test_tokens_of_iterations_add_up_to_prompts_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    monkeypatch.setattr(Gain, "allows", lambda *_: True)
    options: dict[str, Any] = {**ENGINE_OPTIONS, "speculative": "ngram:4:3:1", "async_scheduling": is_async}
    engine = build_engine(EngineConfig(model=str(write_toy_model(tmp_path)), **options))
    prompts = [[7, 8, 9] * 4, [5], [30, 31] * 9, list(range(40, 60))]
    for place, prompt in enumerate(prompts):
        engine.add(
            Request(
                request_id=place,
                prompt_token_ids=prompt,
                params=greedy(40),
                seed=0,
                max_tokens=40,
                eos_token_ids=(),
            )
        )
    seen = num_tokens = num_prefill = most = 0
    while engine.has_work:
        output = engine.step()
        stats = output.stats
        num_tokens += len(output.token_ids)
        most = max(most, max(map(output.request_ids.count, output.request_ids), default=0))
        seen += stats.iteration_tokens + stats.prefill_ends - stats.rejected_tokens
        num_prefill += stats.prefill_tokens
    stats = engine.stats()
    engine.close()
    assert most > 1 and num_tokens == 4 * 40
    # A prompt of one token is computed as a decode is, and ends no prefill.
    assert num_prefill == sum(len(prompt) for prompt in prompts if len(prompt) > 1)
    assert seen == num_tokens + sum(len(prompt) - (len(prompt) == 1) for prompt in prompts)
    assert stats.num_draft_tokens - stats.num_accepted_tokens > 0


def test_the_server_counts_drafts_over_all_engines() -> None:
    counts: dict[str, Any] = {
        "num_drafts": 2,
        "num_draft_tokens": 7,
        "num_accepted_tokens": 5,
        "num_undrafted_requests": 1,
    }
    engines: list[Any] = [
        SimpleNamespace(
            observer=None,
            is_alive=True,
            facts=FakeAsyncEngine().facts,
            stats=EngineStats(**counts, iteration=3, iterations_s=0.5),
        )
        for _ in range(2)
    ]
    lasting = LastingEngine(engines[0])
    metrics = ServerMetrics(lasting, prefix="vllm", model_name="toy")
    for times in (1, 2):
        text = metrics.render().decode()
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "spec_decode" in sample.name
        }
        assert found == {f"vllm:spec_decode_{name}_total": times * value for name, value in counts.items()}
        lasting.replace(engines[1])
    assert (lasting.stats.iteration, lasting.stats.iterations_s) == (9, 1.5)
    engines[1].is_alive = False
    assert lasting.stats.num_draft_tokens == 14 + 7 and lasting.stats.num_running == 0


def test_rejected_tokens_are_no_tokens_of_an_iteration() -> None:
    metrics = ServerMetrics(FakeAsyncEngine(), prefix="nanoflow", model_name="toy")
    metrics.observe_step(EngineStats(iteration_tokens=9, prefill_ends=1, rejected_tokens=3))
    name = "nanoflow:iteration_tokens_total_sum"
    values = (line.split()[-1] for line in metrics.render().decode().splitlines() if line.startswith(name))
    assert list(map(float, values)) == [7.0]
