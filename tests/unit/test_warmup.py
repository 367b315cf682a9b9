"""What is done before the first request: which graphs are recorded, and which batches are timed, within the limits."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.engine.warmup import graphs_of_fallback, graphs_of_plans, probe_batch, probes, time_iterations
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook, PlanEntry
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.scheduler.limits import SchedulerLimits

GRAPH = build_graph(preset_config("llama-3-8b"), None)


def _limits(max_batch_tokens: int, max_num_seqs: int, max_model_len: int) -> SchedulerLimits:
    return SchedulerLimits(
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        num_pages=999,
        page_size=16,
        vocab_size=50,
    )


LIMITS = [_limits(2048, 300, 4096), _limits(64, 300, 40), _limits(1, 1, 2), _limits(8, 2, 4096), _limits(16, 16, 2)]


@pytest.mark.parametrize("limits", LIMITS)
def test_probes_write_nothing_and_stay_within_the_limits(limits: SchedulerLimits) -> None:
    for probe in probes(limits):
        batch = probe_batch(probe, limits)
        assert 1 <= batch.num_tokens <= limits.max_batch_tokens and batch.num_requests <= limits.max_num_seqs
        assert (batch.slots == -1).all() and batch.new_pages.pages.max() < limits.num_pages
        assert batch.context_len.max() <= limits.max_model_len
        assert (batch.context_len >= np.diff(batch.query_start)).all() and batch.positions.min() >= 0
        assert len(batch.positions) == batch.num_tokens == batch.query_start[-1]


def test_probes_tell_tokens_keys_and_prompts_apart() -> None:
    shapes = [probe_batch(probe, LIMITS[0]).shape for probe in probes(LIMITS[0])]
    columns = [[1, s.num_tokens, s.decode_context, s.prefill_context] for s in shapes]
    assert np.linalg.matrix_rank(np.array(columns, float)) == 4


def test_the_largest_batch_of_every_plan_and_the_common_ones_of_the_fallback() -> None:
    whole, half = nanobatch_plan(GRAPH, 512, [256]), nanobatch_plan(GRAPH, 256, [128])
    book = PlanBook(
        fallback=sequential_plan(GRAPH, 1024),
        entries=(
            PlanEntry(plan=whole, min_tokens=400, max_tokens=512, min_decode_share=0.2, max_decode_share=0.5),
            PlanEntry(plan=half, min_tokens=200, max_tokens=250, min_decode_share=1.0),
            PlanEntry(plan=whole, min_tokens=400, max_tokens=448, min_decode_share=0.0, max_decode_share=0.0),
        ),
    )
    limits = _limits(1024, 300, 4096)
    assert [(plan.digest, size.num_tokens) for plan, size in graphs_of_plans(book, limits)] == [
        (whole.digest, 512),
        (half.digest, 256),
    ]
    graphs = graphs_of_fallback(book, limits)
    assert {plan.digest for plan, _ in graphs} == {book.fallback.digest}
    assert len({size for _, size in graphs}) == len(graphs)
    assert max(size.num_tokens for _, size in graphs) == 1024


def test_iterations_are_timed_in_a_row() -> None:
    class FakeFuture:
        def result(self) -> None: ...

    class FakeWorker:
        num_launched = 0

        def launch(self, *_: object) -> FakeFuture:
            self.num_launched += 1
            return FakeFuture()

    worker = FakeWorker()
    samples = time_iterations(worker, sequential_plan(GRAPH, 2048), LIMITS[0], 50)  # type: ignore[arg-type]
    assert worker.num_launched == 6 * len(probes(LIMITS[0]))
    assert all(seconds > 0 for _, seconds in samples)
