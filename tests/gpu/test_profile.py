"""Profiling on a GPU: plausible points alone, on parts and side by side, and products restricted to a partition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings")

from nanoflow.kernels.restricted import kernels_on
from nanoflow.models.presets import PRESETS
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.table import Profile
from nanoflow.profiler.alone import measure_alone, prepare_row, rows_workspace
from nanoflow.profiler.pairs import measure_pairs, measure_parts, pair_tasks, part_tasks
from nanoflow.profiler.profile import Job, new_job, run_job
from nanoflow.profiler.sustained import Span
from nanoflow.profiler.work import Sizes, Task

pytestmark = pytest.mark.gpu
SHORT = Span(settle_s=0.1, measure_s=0.25)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = Sizes(
        max_tokens=1024,
        step=512,
        row_tokens=(512, 1024),
        head_rows=(64,),
        sampled_rows=(64,),
        decode_requests=(64,),
        decode_contexts=(256, 1024),
        prefill_tokens=(1024,),
        prefill_before=(0,),
    )
    return new_job(
        "preset:llama-3-8b",
        PRESETS["llama-3-8b"],
        device=device,
        dtype=torch.bfloat16,
        sizes=sizes,
        path=tmp_path / "profile.json",
        is_quick=True,
    )


@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_proj", "down_proj"])
@torch.inference_mode()
def test_products_restricted_to_a_part_compute_the_same(job: Job, name: str) -> None:
    prepared = prepare_row(job.site, rows_workspace(job.site, 512), name, 512)
    out = prepared.workspace.tensors[prepared.op.writes[0]]
    before, results = out.clone(), []
    kernels = prepared.workspace.model.kernels
    for chosen in (kernels, kernels_on(kernels, 52)):
        out.copy_(before)
        prepared.work(chosen)()
        results.append(out.clone().float())
    assert torch.nn.functional.cosine_similarity(results[0].flatten(), results[1].flatten(), dim=0) > 0.9999


def test_a_profile_is_plausible(job: Job, tmp_path: Path) -> None:
    # Those of one mechanism stand for all pairs: a dozen, not minutes.
    path = tmp_path / "profile.json"
    alone_only = run_job(replace(job, span=SHORT, only="alone"), path)
    assert not alone_only.pairs
    whole = run_job(replace(job, profile=alone_only, span=SHORT, only="beside"), path)
    assert Profile.load(path) == whole
    alone = [point for point in whole.points if point.mechanism is Mechanism.WHOLE]
    assert all(point.time_s > 0 and point.energy_j is not None for point in alone)
    of = {(point.operation, point.num_tokens, point.context): point.time_s for point in alone}
    # 1,024 x 4,096 x 28,672 multiply-adds at 200 to 1,000 TFLOP/s.
    assert 240e-6 < of["gate_up_proj", 1024, 0] < 1.3e-3
    assert of["decode_attention", 64, 256] < of["decode_attention", 64, 1024]
    beside = [pair for pair in pair_tasks(job.site, 1024, 132) if pair.mechanism is Mechanism.BESIDE]
    assert len(whole.pairs) == len(beside) > 0 and {pair.mechanism for pair in whole.pairs} == {Mechanism.BESIDE}
    assert whole.launch_gap_s is not None and 0 <= whole.launch_gap_s < 20e-6
    assert whole.setup.static_power_w is not None and 30 < whole.setup.static_power_w < 500
    # From PCIe 3 to NVLink-C2C.
    assert whole.host_link_bytes_per_s is not None and 5e9 < whole.host_link_bytes_per_s < 450e9


def test_both_of_a_pair_get_a_part_and_fewer_sms_get_less(job: Job) -> None:
    wanted = [pair for pair in pair_tasks(job.site, 1024, 132) if pair.first.operation == "gate_up_proj"]
    points = list(measure_pairs(job.site, wanted, SHORT))
    for point in points:
        assert 0.05 < point.first_performance < 1.15 and 0.05 < point.second_performance < 1.15
        assert point.power_w is not None and point.energy_ratio is not None and 0.5 < point.energy_ratio < 2.0
    divided = sorted((p for p in points if p.mechanism is Mechanism.PARTITION), key=lambda p: p.share)
    assert divided[0].first_performance < divided[-1].first_performance
    assert divided[0].second_performance > divided[-1].second_performance


def test_an_operation_is_slower_on_a_part(job: Job) -> None:
    wanted = [part for part in part_tasks(job.site, 1024, 132) if part.task.num_requests == 340]
    points = list(measure_parts(job.site, wanted, SHORT))
    (whole,) = measure_alone(job.site, [wanted[0].task], SHORT)
    assert [point.time_s for point in points] == sorted((point.time_s for point in points), reverse=True)
    assert points[0].share == pytest.approx(16 / 132) and points[0].time_s > 2 * whole.time_s


def test_sampling_can_be_measured(job: Job) -> None:
    (point,) = measure_alone(job.site, [Task(operation="sampling", num_tokens=64)], SHORT)
    assert 0 < point.time_s < 1e-2
