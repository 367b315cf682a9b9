"""The link between device and host memory: its rate, what copies make of an iteration, and where they are shown."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.cli.main import main
from nanoflow.graph.operation import BatchShape
from nanoflow.hardware import GPUS, parse_gpus
from nanoflow.models.presets import PRESETS
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.host_link import NO_COPIES, Copies, LinkRates, _spec_key, copies_of, link_rates
from nanoflow.profile.table import Profile
from nanoflow.search.shapes import batch_of
from nanoflow.simulate.iteration import IterationModel, graphs_of
from nanoflow.timeline.drawing_svg import svg
from nanoflow.timeline.timeline import COPY_LANE, Span, Timeline, with_copies

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED = RESULTS / "profile_llama-3-8b_h200.json"
BOOK = RESULTS / "plans_llama-3-8b_h200_1024-512.json"
SHAPE = batch_of(2048, 512, 1024.0, 512.0)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.load(STORED)


def test_every_gpu_has_a_link_to_its_host() -> None:
    found = {name: spec.host_link_bytes_per_s.value for name, spec in GPUS.items()}
    assert (found["a100-80"], found["h100"], found["h200"]) == (22e9, 50e9, 50e9)
    assert all(1e10 <= value <= 3e11 for value in found.values())
    assert "estimate" in GPUS["h200"].host_link_bytes_per_s.source


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("NVIDIA H200", 50e9),
        ("NVIDIA H20", 50e9),
        ("NVIDIA A100-SXM4-80GB", 22e9),
        ("NVIDIA H100 80GB HBM3", 50e9),
        ("NVIDIA L40S", 22e9),
        ("NVIDIA GB200", 300e9),
        ("some processor", 22e9),
    ],
)
def test_an_older_profile_has_the_estimate_for_its_gpu(profile: Profile, gpu: str, expected: float) -> None:
    assert profile.host_link_bytes_per_s is None
    renamed = replace(profile, setup=replace(profile.setup, gpu=gpu))
    graph = graphs_of(renamed)[0]
    assert link_rates(renamed, graph).link_bytes_per_s == expected
    measured = Profile.from_json(replace(renamed, host_link_bytes_per_s=7e9).to_json())
    assert link_rates(measured, graph).link_bytes_per_s == 7e9


def test_a_gpu_is_known_by_the_longest_name_that_its_own_begins_with() -> None:
    assert _spec_key("NVIDIA H200") == "h200" and _spec_key("NVIDIA H20") == "h20"
    assert _spec_key("NVIDIA A100 80 GB SXM") == "a100-80" and _spec_key("NVIDIA A10") == "a10"
    assert _spec_key("AMD EPYC, 2 threads") is None


def test_memory_has_the_rate_of_the_fastest_decode_attention(profile: Profile) -> None:
    rates = link_rates(profile, graphs_of(profile)[0])
    assert 4.2e12 < rates.memory_bytes_per_s < 4.8e12
    estimate = estimated_profile("preset:llama-3-8b", PRESETS["llama-3-8b"], parse_gpus("a100-80x2"), 256)
    assert estimate.host_link_bytes_per_s == 22e9
    assert link_rates(estimate, graphs_of(estimate)[0]).memory_bytes_per_s == pytest.approx(2.0e12, rel=0.05)


def test_an_iteration_takes_the_longer_of_its_layers_and_its_copies() -> None:
    copies = Copies(rates=LinkRates(link_bytes_per_s=1e6, memory_bytes_per_s=1e8), token_bytes=1000)
    assert copies.lane_s(10) == pytest.approx(0.01)
    assert copies.lane_s(10, 30) == pytest.approx(0.03), "both directions at once"
    assert copies.beside(1.0, 10) == pytest.approx(1.0 + 1e-4)
    assert copies.beside(1.0, 10, 30) == pytest.approx(1.0 + 4e-4)
    assert copies.beside(0.002, 10) == pytest.approx(0.01)
    assert NO_COPIES.beside(0.1234567, 10**6, 10**6) == 0.1234567 and NO_COPIES.lane_s(10**6) == 0.0


def test_predictions_of_iterations_have_the_copies(profile: Profile) -> None:
    graph = graphs_of(profile)[0]
    copies = copies_of(profile, graph, host_gib=1.0)
    # Keys and values of 8 heads of 128 in 32 layers, two bytes each.
    assert copies.token_bytes == 2 * 8 * 128 * 32 * 2
    assert copies_of(profile, graph, host_gib=0.0) is NO_COPIES
    without, beside = IterationModel(profile), IterationModel(profile, copies=copies)
    more_s = beside.cost(SHAPE).time_s - without.cost(SHAPE).time_s
    assert more_s == pytest.approx(2048 * copies.token_bytes / copies.rates.memory_bytes_per_s, rel=1e-6)
    assert beside.predict(SHAPE).copies_s == pytest.approx(2048 * copies.token_bytes / 50e9)
    assert without.predict(SHAPE).copies_s == 0.0
    assert beside.predict(SHAPE).iteration_s == pytest.approx(without.predict(SHAPE).iteration_s + more_s)
    slow = IterationModel(
        replace(profile, host_link_bytes_per_s=1e9),
        copies=copies_of(replace(profile, host_link_bytes_per_s=1e9), graph, host_gib=1.0),
    )
    assert slow.cost(SHAPE).time_s == pytest.approx(2048 * copies.token_bytes / 1e9)
    energies_j = slow.cost(SHAPE).energy_j, without.cost(SHAPE).energy_j
    assert None not in energies_j and energies_j[0] > energies_j[1]  # type: ignore[operator]


def test_a_tensor_parallel_gpu_copies_its_part() -> None:
    whole, half = (
        estimated_profile("preset:llama-3-8b", PRESETS["llama-3-8b"], parse_gpus(gpus), 256)
        for gpus in ("h100", "h100x2")
    )
    found = [copies_of(each, graphs_of(each)[0], host_gib=1.0).token_bytes for each in (whole, half)]
    assert found[0] == 2 * found[1]


def span(layer: int, start_s: float, stop_s: float) -> Span:
    return Span(
        operation="o_proj",
        layer=layer,
        start_token=0,
        stop_token=8,
        lane="products",
        resource=None,
        share=1.0,
        start_s=start_s,
        stop_s=stop_s,
    )


def test_copies_are_a_lane_beside_the_layers() -> None:
    line = Timeline(name="line", spans=(span(0, 0.0, 1.0), span(1, 0.5, 2.0), span(2, 2.5, 3.0)), period_s=1.0)
    assert with_copies(line, 0.0, 8) is line
    copies = [each for each in with_copies(line, 0.8, 8).spans if each.lane == COPY_LANE]
    assert [(each.layer, each.start_s) for each in copies] == [(0, 0.0), (1, 0.8), (2, 2.5)]
    assert [each.stop_s - each.start_s for each in copies] == pytest.approx([0.8] * 3)
    spans = with_copies(line, 0.8, 8).spans
    assert list(spans) == sorted(spans, key=lambda each: each.start_s) and len(spans) == 6
    assert "save_pages" in svg([with_copies(line, 0.8, 8)])


def test_pictures_have_the_lane_of_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "plan.svg"
    command = ["plan", "show", str(BOOK), "--profile", str(STORED), "--layers", "2"]
    files = ["--svg", str(picture), "--chrome-trace", str(trace)]
    assert main([*command, *files, "--kv-host-gib", "8"]) == 0
    lanes = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert COPY_LANE in lanes
    assert "save_pages" in picture.read_text()
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each.get("ph") == "X"]
    copies = [each for each in events if "save_pages" in each["name"]]
    assert len(copies) == 2
    assert copies[0]["dur"] == pytest.approx(2048 * 131072 / 50e9 / 32 * 1e6, rel=1e-3)
    assert main(command) == 0
    assert COPY_LANE not in [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]


@pytest.mark.parametrize("options", [["--kv-host-gib", "4"], ["--kv-host-gib", "-1", "--profile", str(STORED)]])
def test_a_lane_of_copies_needs_a_profile(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(BOOK), *options]) != 0
    assert "--kv-host-gib" in capsys.readouterr().err


def test_one_iteration_and_a_search_of_one_batch_tell_of_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(STORED), "--batch", "2048", "--kv-host-gib", "4"]) == 0
    assert "copies      5.37 ms beside it" in capsys.readouterr().out
    profile = tmp_path / "slow.json"
    profile.write_bytes(replace(Profile.load(STORED), host_link_bytes_per_s=1e9).to_json())
    one = ["--max-batch-tokens", "128", "--decodes", "128", "--time-limit", "0.01", "--quiet", "--kv-host-gib", "4"]
    assert main(["search", str(profile), "-o", str(tmp_path / "plan.json"), *one]) == 0
    assert "iteration 16.78 ms" in capsys.readouterr().out, "128 tokens of 131,072 bytes at 1 GB/s"


def test_a_search_for_a_book_counts_copies(profile: Profile) -> None:
    from nanoflow.plan.book import BookLimits
    from nanoflow.search.workloads import SimulatedWorkloads

    slow = replace(profile, host_link_bytes_per_s=1e9)
    limits = BookLimits(max_batch_tokens=1024, max_num_seqs=64)
    rates = []
    for host_gib in (0.0, 1.0):
        simulated = SimulatedWorkloads(
            slow,
            ["512/16"],
            num_requests=40,
            seed=0,
            gpu_memory_utilization=0.9,
            copies=copies_of(slow, graphs_of(slow)[0], host_gib=host_gib),
        )
        rates.append(simulated.sequential(limits)[0].tokens_per_s)
    # With a link of 1 GB/s it is the link that limits: 131,072 bytes a token that is computed.
    assert rates[1] < 0.5 * rates[0] and rates[1] == pytest.approx(1e9 / 131072, rel=0.1)


def test_shapes_of_no_copies_cost_what_they_did(profile: Profile) -> None:
    model = IterationModel(profile)
    for shape in (SHAPE, BatchShape(num_tokens=1, num_decode_tokens=1, decode_context=10, num_sampled=1)):
        assert model.cost(shape) == IterationModel(profile, copies=NO_COPIES).cost(shape)
    assert dataclasses.asdict(model.predict(SHAPE))["copies_s"] == 0.0
