"""Simulated serving runs: exact where they can be computed in the head, and close to what one H200 measured."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.predictions.validation import compare

from nanoflow.cli.main import main
from nanoflow.config import ConfigError
from nanoflow.graph.operation import BatchShape
from nanoflow.hardware import parse_gpus
from nanoflow.models.presets import PRESETS
from nanoflow.plan.book import BookLimits, StoredBook
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import Cost, Profile
from nanoflow.run_metrics import RunMetrics
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.simulate.iteration import IterationModel
from nanoflow.simulate.serving import Cluster, SimulatedRun, least_replicas, limits_for, simulate
from nanoflow.workload import Lengths, draw_arrivals
from tests.all_cases import RUNS_ALL_CASES, part

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PROFILE = RESULTS / "profile_llama-3-8b_h200.json"
STEP_S = 0.01
LIMITS = SchedulerLimits(
    max_batch_tokens=64, max_num_seqs=8, max_model_len=64, num_pages=64, page_size=16, vocab_size=100
)


@dataclass
class Constant:
    """Iterations that all take the same."""

    shapes: list[BatchShape] = field(default_factory=list)

    def cost(self, shape: BatchShape) -> Cost:
        self.shapes.append(shape)
        return Cost(time_s=STEP_S, energy_j=2.0)


def run(
    lengths: Sequence[tuple[int, int]],
    arrivals_s: Sequence[float] | None = None,
    *,
    limits: SchedulerLimits = LIMITS,
    num_replicas: int = 1,
) -> SimulatedRun:
    found = [Lengths(num_prompt_tokens=prompt, num_output_tokens=output) for prompt, output in lengths]
    cluster = Cluster(limits=limits, iterations=Constant(), num_replicas=num_replicas)
    return simulate(cluster, found, arrivals_s or [0.0] * len(found))


def test_one_request_alone() -> None:
    """A prompt of 16 in one iteration, which gives the first token; then one iteration a token."""
    found = run([(16, 4)])
    metrics = found.metrics
    assert metrics.ttft_s is not None and metrics.ttft_s.mean == pytest.approx(STEP_S)
    assert metrics.tpot_s is not None and metrics.tpot_s.mean == pytest.approx(STEP_S)
    assert metrics.num_output_tokens == 4 and metrics.num_short == 0


def test_a_batch_is_formed_while_the_one_before_runs() -> None:
    """Who comes in the middle of an iteration finds the next one formed, and joins that after it; nothing is idle."""
    found = run([(16, 10), (16, 1)], [0.0, 0.5 * STEP_S])
    assert found.metrics.ttft_s is not None
    assert found.metrics.ttft_s.mean == pytest.approx((1.0 + 2.5) / 2 * STEP_S)
    assert found.metrics.duration_s == pytest.approx(10 * STEP_S) and found.num_iterations == 10


def test_prompts_beyond_the_budget_take_more_iterations() -> None:
    """Four prompts of 32 and a budget of 64: two are through after one iteration, two after two."""
    found = run([(32, 1)] * 4)
    assert found.metrics.ttft_s is not None
    assert found.metrics.ttft_s.mean == pytest.approx(1.5 * STEP_S)
    assert found.metrics.duration_s == pytest.approx(2 * STEP_S) and found.num_iterations == 2
    assert found.mean_batch_tokens == 64
    assert found.metrics.energy_per_token_j == pytest.approx(4.0 / (4 * 33))


def test_every_request_gets_its_tokens_and_runs_repeat() -> None:
    lengths = [(1 + 7 * i % 40, 1 + 5 * i % 20) for i in range(60)]
    arrivals_s = draw_arrivals(60, 50.0, seed=1)
    found, again = run(lengths, arrivals_s), run(lengths, arrivals_s)
    assert found == again
    assert found.metrics.num_completed == 60 and found.metrics.num_short == 0
    assert found.metrics.num_output_tokens == sum(output for _, output in lengths)
    assert found.metrics.num_prompt_tokens == sum(prompt for prompt, _ in lengths)


def test_under_light_load_the_first_token_takes_one_iteration() -> None:
    found = run([(16, 3)] * 20, [float(i) for i in range(20)])
    assert found.metrics.ttft_s is not None and found.metrics.ttft_s.p99 == pytest.approx(STEP_S)
    # Between requests the device is idle, and without static power idling costs nothing.
    assert found.metrics.energy_per_token_j == pytest.approx(20 * 3 * 2.0 / (20 * 19), rel=0.4)


def test_gpus_that_have_nothing_to_do_draw_their_static_power() -> None:
    """Two replicas, one of which is never used; four GPUs in each."""
    lengths = [Lengths(num_prompt_tokens=16, num_output_tokens=3)] * 20
    arrivals_s = [float(i) for i in range(20)]
    energies_j = []
    for static_power_w in (0.0, 5.0):
        cluster = Cluster(
            limits=LIMITS,
            iterations=Constant(),
            num_replicas=2,
            gpus_per_replica=4,
            static_power_w=static_power_w,
        )
        metrics = simulate(cluster, lengths, arrivals_s).metrics
        assert metrics.energy_per_token_j is not None and metrics.duration_s == pytest.approx(19 + 3 * STEP_S)
        energies_j.append(metrics.energy_per_token_j * 20 * 19)
    idle_s = 2 * (19 + 3 * STEP_S) - 20 * 3 * STEP_S
    assert energies_j == pytest.approx([4 * 60 * 2.0, 4 * (60 * 2.0 + 5.0 * idle_s)])


def test_few_pages_make_requests_wait() -> None:
    lengths = [(32, 30)] * 8
    limits = SchedulerLimits(
        max_batch_tokens=64, max_num_seqs=8, max_model_len=64, num_pages=8, page_size=16, vocab_size=100
    )
    ample, scarce = run(lengths), run(lengths, limits=limits)
    assert scarce.metrics.duration_s > 1.5 * ample.metrics.duration_s
    assert scarce.metrics.num_completed == 8 and 0.9 < scarce.peak_page_share <= 1


def test_more_replicas_are_faster_and_share_the_work() -> None:
    durations = [run([(32, 20)] * 48, num_replicas=count).metrics.duration_s for count in (1, 2, 4, 48)]
    assert all(more < fewer for fewer, more in itertools.pairwise(durations))
    # One request a replica: an iteration for the prompt, nineteen more.
    assert durations[-1] == pytest.approx(20 * STEP_S)


def test_a_burst_goes_to_all_replicas() -> None:
    assert run([(63, 1)] * 10, num_replicas=10).num_iterations == 10


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Iterations that take what these coefficients say."""

    iteration_time: IterationTime

    def cost(self, shape: BatchShape) -> Cost:
        return Cost(time_s=self.iteration_time.predict_s(shape), energy_j=None)


def test_a_bound_on_iterations_shortens_the_longest_gaps() -> None:
    """Long prompts come while others decode: the bound cuts them up, whatever it takes, and all tokens still come."""
    truth = IterationTime(fixed_s=2e-3, token_s=1e-5, floor_tokens=200, sampled_s=1e-6, key_s=1e-8, pair_s=1e-9)
    limits = SchedulerLimits(
        max_batch_tokens=4096, max_num_seqs=64, max_model_len=8192, num_pages=9999, page_size=16, vocab_size=100
    )
    lengths = [Lengths(num_prompt_tokens=100 + 397 * i % 7000, num_output_tokens=100) for i in range(60)]
    arrivals_s = [0.15 * i for i in range(60)]

    def simulated(pace: Pace) -> RunMetrics:
        cluster = Cluster(limits=limits, iterations=Linear(iteration_time=truth), num_replicas=1, pace=pace)
        return simulate(cluster, lengths, arrivals_s).metrics

    unbounded = simulated(Pace())
    bounded = simulated(Pace(max_itl_s=0.012, iteration_time=truth))
    assert unbounded.itl_s is not None and bounded.itl_s is not None
    assert unbounded.itl_s.p99 > 0.03 and bounded.itl_s.p99 < 0.0125
    assert bounded.num_output_tokens == unbounded.num_output_tokens == 60 * 100 and not bounded.num_short


@pytest.mark.parametrize("least", [1, 2, 3, 7, 8, 100])
def test_the_fewest_replicas_are_found(least: int) -> None:
    tried: list[int] = []

    def is_enough(count: int) -> bool:
        tried.append(count)
        return count >= least

    assert least_replicas(is_enough, 100) == least
    assert len(tried) == len(set(tried)) <= 15
    assert least_replicas(lambda count: count >= least, least - 1 or 1) == (1 if least == 1 else None)


def test_what_does_not_fit_is_said_with_numbers() -> None:
    profile = Profile.load(PROFILE)
    graph = IterationModel(profile).graph
    lengths = [Lengths(num_prompt_tokens=4000, num_output_tokens=100)]
    options = {"max_batch_tokens": 2048, "max_num_seqs": 8}
    limits = limits_for(profile, graph, lengths, gpu_memory_utilization=0.9, **options)
    assert limits.num_pages == 8 * 257 and limits.max_model_len == 4100
    with pytest.raises(ConfigError, match=r"weights take 16\.1 GB, which leaves \d+ tokens .* for a request of 4100"):
        limits_for(profile, graph, lengths, gpu_memory_utilization=0.11, **options)


def test_gpus_that_share_a_model_share_its_weights() -> None:
    """16.1 GB of them: on cards of 20 GB, of which 18 are used, one has 1.9 GB left for keys, and each of two 9.9."""
    profile = Profile.load(PROFILE)
    graph = IterationModel(profile).graph
    lengths = [Lengths(num_prompt_tokens=400, num_output_tokens=100)]
    page_bytes = graph.kv_bytes_per_token(2) * profile.page_size
    for num_gpus in (1, 2):
        setup = replace(profile.setup, memory_bytes=20e9, num_gpus=num_gpus)
        limits = limits_for(
            replace(profile, setup=setup),
            graph,
            lengths,
            max_batch_tokens=2048,
            max_num_seqs=1 << 20,
            gpu_memory_utilization=0.9,
        )
        assert limits.num_pages == int((18e9 - graph.num_parameters * 2 / num_gpus) // page_bytes)


def test_weights_take_the_memory_of_the_form_in_which_they_are_kept() -> None:
    """233.7 GB in 16 bits; with experts in 4 bits a gpt-oss-120b fits one card of 141 GB."""
    setup = parse_gpus("H200")
    lengths = [Lengths(num_prompt_tokens=400, num_output_tokens=100)]
    options: dict[str, Any] = {"max_batch_tokens": 512, "max_num_seqs": 8, "gpu_memory_utilization": 0.9}
    for is_mxfp4 in (True, False):
        profile = estimated_profile("oss", PRESETS["gpt-oss-120b"], setup, 512, is_mxfp4=is_mxfp4)
        graph = IterationModel(profile).graph
        if is_mxfp4:
            assert limits_for(profile, graph, lengths, **options).max_model_len == 500
        else:
            with pytest.raises(ConfigError, match=r"the weights take 233\.7 GB"):
                limits_for(profile, graph, lengths, **options)


def test_measured_runs_of_one_h200_within_seven_percent() -> None:
    """Constant workloads of Llama-3-8B, by default those with most prompts and with most decodes.

    The traces are not part of the repository.
    """
    stored = sorted(RESULTS.glob("throughput_llama-3-8b_[0-9]*.json"))
    paths = part([path for path in stored if path.stem.endswith(("_2048-128", "_512-1024"))], of=stored)
    rows = list(compare(Profile.load(PROFILE), paths, traces=None))
    assert len(rows) == len(paths) == (5 if RUNS_ALL_CASES else 2)
    for row in rows:
        assert abs(row.error) < 0.07, row
        assert row.measured_j is not None and row.simulated_j is not None
        assert abs(row.simulated_j / row.measured_j - 1) < 0.07, row


def test_the_command_describes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    command = ["simulate", str(PROFILE), "--workload", "64/8", "--num-requests", "20", "--request-rate", "100"]
    assert main([*command, "--gpus", "2", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "2 x NVIDIA H200 (measured profile), 2 replicas" in shown and "TTFT" in shown and "mJ/token" in shown
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["result"]["metrics"]["num_completed"] == 20


def test_the_command_predicts_an_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(PROFILE), "--batch", "2048", "--decodes", "1000"]) == 0
    assert "2,048 tokens, 1,000 of them decodes" in capsys.readouterr().out


def test_a_book_is_simulated_under_its_own_limits(tmp_path: Path) -> None:
    limits = BookLimits(max_batch_tokens=4096, max_num_seqs=32)
    book, result = tmp_path / "plans.json", tmp_path / "result.json"
    book.write_bytes(StoredBook(entries=(), limits=limits).to_json())
    options = ["--workload", "64/4", "--num-requests", "40", "--json", str(result), "--plan", str(book)]
    found = []
    for more in ([], ["--max-num-seqs", "8"]):
        assert main(["simulate", str(PROFILE), *options, *more]) == 0
        document = json.loads(result.read_text())
        asked = document["simulation"]
        found.append((asked["max_batch_tokens"], asked["max_num_seqs"], document["result"]["peak_requests"]))
    assert found == [(4096, 32, 32), (4096, 8, 8)], "but a number that is given wins"


def test_the_command_finds_the_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", str(PROFILE), "--workload", "512/32", "--num-requests", "300", "--request-rate", "300"]
    assert main([*command, "--find-gpus", "--max-normalized-latency-ms", "12"]) == 0
    *tries, answer = capsys.readouterr().out.splitlines()
    assert "too slow" in tries[0] and "GPUs serve 300 requests/s at 12 ms/token" in answer
    assert main([*command, "--find-gpus", "--max-normalized-latency-ms", "0.1", "--max-gpus", "2"]) == 1
    assert "2 GPUs are not enough" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--find-gpus"], "find_gpus needs a request_rate"),
        (["--batch", "10", "--decodes", "11"], "decodes needs --batch and may not exceed it"),
        (["--request-rate", "0"], "request_rate must be positive"),
        (["--workload", "512"], "workload must be IN/OUT"),
        (["--plan", "none.json"], "cannot read plan none.json"),
        (["--percentile", "42"], "percentile must be 50, 90 or 99"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(PROFILE), *options]) == 1
    assert message in capsys.readouterr().err


def test_search_and_simulation_need_no_torch() -> None:
    script = (
        "import sys; from nanoflow.cli.main import main; "
        f"status = main(['simulate', {str(PROFILE)!r}, '--workload', '32/4', '--num-requests', '3']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode == 0
