"""Whole iterations of a tiny model on a CPU, and batches made of their shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.predictions import overlap

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.plan import PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.profile.table import Profile
from nanoflow.profiler.profile import new_job, run_job
from nanoflow.profiler.sustained import Span
from nanoflow.profiler.work import Sizes
from nanoflow.search.shapes import batch_of
from nanoflow.simulate.iteration import graphs_of
from nanoflow.trials.iterations import dense_batch, measure_trials

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
CPU = torch.device("cpu")
SPAN = Span(settle_s=0.0, measure_s=0.01)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    job = new_job("tiny", CONFIG, device=CPU, dtype=torch.float32, sizes=Sizes.small(64), path=path, is_quick=True)
    run_job(job, path)
    return path


@pytest.mark.parametrize(
    "shape",
    [
        batch_of(64, 20, 300.0, 22.0),
        batch_of(40, 40, 17.0, 1.0),
        batch_of(64, 0, 0.0, 64.0),
        BatchShape(
            num_tokens=50,
            num_decode_tokens=10,
            decode_context=1000,
            prefill_context=40 * 100 + 40 * 21 // 2,
            prefill_kv_tokens=2 * 120,
            num_sampled=11,
        ),
    ],
)
def test_a_batch_has_the_shape_it_was_made_of(shape: BatchShape) -> None:
    batch = dense_batch(shape, 16, 1000)
    made = batch.shape
    assert (made.num_tokens, made.num_decode_tokens) == (shape.num_tokens, shape.num_decode_tokens)
    assert made.decode_context == shape.decode_context and made.num_sampled == shape.num_sampled
    assert made.prefill_context == pytest.approx(shape.prefill_context, rel=0.02)
    assert made.prefill_kv_tokens == pytest.approx(shape.prefill_kv_tokens, rel=0.02)
    assert len(np.unique(batch.slots)) == batch.num_tokens, "no two tokens share a place"
    if shape.num_decode_tokens:
        contexts, mean = batch.context_len[: batch.num_decodes], shape.decode_context / shape.num_decode_tokens
        assert contexts.min() < mean / 4 and mean * 1.75 < contexts.max() < mean * 2.25


def test_every_plan_is_tried_beside_the_sequential_one(stored: Path) -> None:
    profile = Profile.load(stored)
    (graph,) = graphs_of(profile)
    shapes = [batch_of(64, 20, 300.0, 22.0), batch_of(32, 32, 40.0, 1.0)]
    wanted = [(shape, nanobatch_plan(graph, 64, [cut])) for shape in shapes for cut in (16, 32)]
    trials = list(measure_trials(profile, wanted, device=CPU, span=SPAN))
    assert [(trial.shape, trial.plan) for trial in trials] == wanted
    assert trials[0].sequential is trials[1].sequential and trials[2].sequential is not trials[0].sequential
    for trial in trials:
        assert trial.gain == trial.sequential.time_s / trial.planned.time_s > 0
    assert list(measure_trials(profile, [], device=CPU)) == []


def test_a_plan_that_is_too_small_is_refused(stored: Path) -> None:
    profile = Profile.load(stored)
    wanted = [(batch_of(64, 20, 300.0, 22.0), sequential_plan(graphs_of(profile)[0], 32))]
    with pytest.raises(PlanError, match="for 32 tokens"):
        list(measure_trials(profile, wanted, device=CPU, span=SPAN))


def test_the_benchmark_compares_with_the_prediction(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = stored.parent / "overlap.json"
    batches = ["--batches", "64:20:300:22", "--device", "cpu", "--json", str(out)]
    assert overlap.main(["--profile", str(stored), *batches]) == 0
    assert "nano-batches" in capsys.readouterr().out and '"predicted_gain"' in out.read_text(encoding="utf-8")
