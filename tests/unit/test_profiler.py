"""Profiling a tiny model on a CPU: which points there are, what each stands for, and going on with a stored profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoflow.executor.buffers import Workspace
from nanoflow.executor.streams import LaneError, partition_pair, partition_sms
from nanoflow.graph.operation import OpKind
from nanoflow.models.config_json import parse
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.table import SAMPLING, CostTable, Point, Profile, ProfileError, write_profile
from nanoflow.profiler import alone, carry, pairs, profile, site
from nanoflow.profiler.alone import measure_alone
from nanoflow.profiler.carry import CarryTask, carry_tasks
from nanoflow.profiler.pairs import PairTask, pair_tasks
from nanoflow.profiler.profile import Job, new_job, run_job
from nanoflow.profiler.setup import check_same_machine
from nanoflow.profiler.site import Site
from nanoflow.profiler.sustained import SPANS, Span, Sustained
from nanoflow.profiler.windows import balanced_counts, queue_order
from nanoflow.profiler.work import Sizes, Task, cache_bytes, num_chunks, tasks

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
SIZES = Sizes(
    max_tokens=48,
    step=16,
    row_tokens=(16, 48),
    head_rows=(1, 16),
    sampled_rows=(4,),
    decode_requests=(2, 40, 64),
    decode_contexts=(20, 500),
    prefill_tokens=(8, 48),
    prefill_before=(0, 24),
    prefill_chunk=16,
    max_cache_bytes=160_000,
)
SITE = Site(graph=build_graph(parse(CONFIG), None), device=torch.device("cpu"), dtype=torch.float32, page_size=16)


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPANS, "cpu", Span(settle_s=0.0, measure_s=0.001))


def test_every_operation_has_its_points() -> None:
    found = tasks(SITE, SIZES)
    graph = SITE.graph
    assert {task.operation for task in found} == {op.name for op in graph.operations()} | {SAMPLING}
    of = {
        name: [(t.num_tokens, t.context) for t in found if t.operation == name] for name in {t.operation for t in found}
    }
    assert of["qkv_proj"] == [(16, 0), (32, 0), (48, 0)]
    assert of["lm_head"] == [(1, 0), (16, 0)]
    # 64 requests exceed the budget, 40 of 500 keys (2 x 40 x 500 x 16 x 4 bytes) the memory.
    assert of["decode_attention"] == [(2, 20), (2, 500), (40, 20)]
    # 48 tokens are three chunks of 16: each token sees 8.5 of its own.
    assert of["prefill_attention"] == [(8, 4.5), (8, 28.5), (48, 8.5), (48, 32.5)]


@pytest.mark.parametrize(("is_quick", "measure_s"), [(False, 0.4), (True, 0.2)])
def test_a_quick_look_settles_as_long(
    is_quick: bool, measure_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before power and clocks have settled, a GPU draws more than its limit and is faster than it can stay."""
    monkeypatch.setitem(SPANS, "cpu", Span(settle_s=0.1, measure_s=0.4))
    path = tmp_path / "profile.json"
    job = new_job("tiny", CONFIG, device=SITE.device, dtype=SITE.dtype, sizes=SIZES, path=path, is_quick=is_quick)
    assert job.span == Span(settle_s=0.1, measure_s=measure_s)


def test_products_are_dense_up_to_2048_tokens_and_coarser_above() -> None:
    found = [t.num_tokens for t in tasks(SITE, Sizes(max_tokens=8192)) if t.operation == "qkv_proj"]
    assert found == [*range(128, 2049, 128), 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192]
    larger = [t.num_tokens for t in tasks(SITE, Sizes(max_tokens=15000)) if t.operation == "qkv_proj"]
    assert larger == [*found, 10240, 12288, 14336, 15000], "the budget itself too"
    rows = [t.num_tokens for t in tasks(SITE, Sizes(max_tokens=16384)) if t.operation == "attn_norm"]
    assert max(rows) == 8192, "others are in proportion"
    decodes = {t.num_tokens for t in tasks(SITE, Sizes(max_tokens=16384)) if t.operation == "decode_attention"}
    assert max(decodes) == 2048


@pytest.mark.parametrize("budget", [1, 64, 100, 2048, 3000])
def test_the_budget_is_covered(budget: int) -> None:
    found = tasks(SITE, Sizes(max_tokens=budget))
    assert max(task.num_tokens for task in found if task.operation == "qkv_proj") == budget
    assert all(task.num_tokens <= budget for task in found)
    assert {task.operation for task in found} >= {op.name for op in SITE.graph.operations()}


def test_all_points_can_be_measured() -> None:
    wanted = tasks(SITE, SIZES)
    measured = list(measure_alone(SITE, wanted))
    assert {point.key for point in measured} == {task.key for task in wanted}
    assert all(point.time_s > 0 and point.energy_j is None for point in measured)


@pytest.mark.parametrize("min_data_bytes", [1, 1 << 40], ids=["one layer", "all layers"])
def test_a_point_is_of_one_call(monkeypatch: pytest.MonkeyPatch, min_data_bytes: int) -> None:
    def microsecond_a_call(work: Callable[[], None], _device: object, _span: object) -> Sustained:
        calls.clear()
        work()
        return Sustained(time_s=len(calls) * 1e-6, energy_j=len(calls) * 2.0, spread=0.0, clock_mhz=None)

    calls: list[object] = []
    monkeypatch.setattr(alone, "sustained", microsecond_a_call)
    monkeypatch.setattr(site, "_MIN_DATA_BYTES", min_data_bytes)
    monkeypatch.setattr(Workspace, "run_whole", lambda *args: calls.append(args))
    wanted = [
        Task(operation="qkv_proj", num_tokens=16),
        Task(operation="lm_head", num_tokens=16),
        Task(operation="decode_attention", num_tokens=2, num_requests=2, before=19),
    ]
    for point in measure_alone(SITE, wanted):
        assert [point.time_s, point.energy_j] == pytest.approx([1e-6, 2.0])


def job(path: Path, *, is_fresh: bool = False, dtype: torch.dtype = torch.float32) -> Job:
    return new_job("tiny", CONFIG, device=torch.device("cpu"), dtype=dtype, sizes=SIZES, path=path, is_fresh=is_fresh)


def test_a_profile_is_written_as_it_grows_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception): ...

    def stops(*args: object) -> list[Point]:
        def points() -> object:
            for number, point in enumerate(measure_alone(*args)):  # type: ignore[arg-type]
                if number == 7:
                    raise Stopped
                yield point

        return points()  # type: ignore[return-value]

    path = tmp_path / "deep" / "profile.json"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(profile, "measure_alone", stops)
        run_job(job(path), path)
    first = Profile.load(path)
    assert len(first.points) == 5
    continued = job(path)
    assert len(continued.wanted()) == len(tasks(SITE, SIZES)) - 5
    whole = run_job(continued, path)
    assert Profile.load(path) == whole and whole.points[:5] == first.points
    assert len(job(path).wanted()) == 0 and len(job(path, is_fresh=True).wanted()) == len(tasks(SITE, SIZES))
    assert CostTable(whole, SITE.graph).cost("lm_head", 3).time_s > 0
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_profile_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    made = job(path).profile
    write_profile(made, path)
    with pytest.raises(ProfileError, match=r"dtype float32, not bfloat16: name another file or give --fresh"):
        job(path, dtype=torch.bfloat16)
    write_profile(replace(made, setup=replace(made.setup, gpu="H20")), path)
    with pytest.raises(ProfileError, match=r"made with gpu H20, here it is cpu"):
        job(path)
    write_profile(replace(made, setup=replace(made.setup, software={"torch": "1"})), path)
    with pytest.raises(ProfileError, match=r"made with software"):
        job(path)


def test_another_driver_is_the_same_machine_but_an_estimate_is_none(tmp_path: Path) -> None:
    made = job(tmp_path / "none").profile
    check_same_machine(replace(made, setup=replace(made.setup, driver="1")), made.setup)
    with pytest.raises(ProfileError, match="made with power_limit_w 300"):
        check_same_machine(replace(made, setup=replace(made.setup, power_limit_w=300.0)), made.setup)
    with pytest.raises(ProfileError, match="is an estimate for cpu"):
        check_same_machine(replace(made, setup=replace(made.setup, is_measured=False)), made.setup)


def test_the_gap_is_what_a_layer_takes_beyond_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    begun = job(path)
    layer = [op.name for op in SITE.graph.layer if op.name != "decode_attention"]
    points = tuple(
        Point(operation=name, num_tokens=48, context=context, time_s=time_s)
        for name in layer
        for context, time_s in (((8.5, 2e-3), (32.5, 9e-3)) if name == "prefill_attention" else ((0.0, 1e-3),))
    )
    monkeypatch.setattr(profile, "measure_layer", lambda *_: (len(layer) + 1) * 1e-3 + len(layer) * 5e-6)
    assert profile.launch_gap_s(begun, replace(begun.profile, points=points)) == pytest.approx(5e-6)
    assert profile.launch_gap_s(begun, begun.profile) is None


def test_partitions_are_rounded_to_groups_of_multiprocessors() -> None:
    assert [partition_sms(132, 1 - second / 132) for second in (16, 32, 48, 64, 80)] == [
        (116, 16),
        (100, 32),
        (84, 48),
        (68, 64),
        (52, 80),
    ]
    assert partition_sms(132, 0.5) == (68, 64)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.99, 0.01])
def test_a_share_that_leaves_nothing_says_what_would_do(share: float) -> None:
    with pytest.raises(LaneError, match=r"of 132 SMs.*(reduce it to 0\.94|raise it to 0\.09)") as error:
        partition_sms(132, share)
    limit = float(str(error.value).split("it to ")[1].split(" ")[0])
    # The share that it names is one that can be had.
    assert min(partition_sms(132, limit)) >= 8


def test_a_cpu_has_no_partitions_and_no_pairs() -> None:
    with pytest.raises(LaneError, match="'cpu' has no SMs"):
        partition_pair(torch.device("cpu"), 0.5)
    assert pair_tasks(SITE, 1024, 132) == []


def test_products_of_fewer_tokens_are_measured_beside_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_can_cut_products", lambda _: True)
    found = pair_tasks(replace(SITE, device=torch.device("cuda", 0)), 1024, 132)
    beside = [pair.first for pair in found if pair.mechanism is Mechanism.BESIDE]
    sizes = {name: [task.num_tokens for task in beside if task.operation == name] for name in ("o_proj", "down_proj")}
    assert sizes == {"o_proj": [1024, 512, 256], "down_proj": [1024, 512, 256]}
    assert [task.num_tokens for task in beside if task.num_requests] == [1024]
    others = {pair.first.num_tokens for pair in found if pair.mechanism is not Mechanism.BESIDE}
    assert others == {1024}


@pytest.mark.parametrize(("budget", "largest"), [(512, 512), (1024, 1024), (2048, 1024), (4096, 2048), (16384, 4096)])
def test_pairs_have_the_halves_of_the_token_budget(monkeypatch: pytest.MonkeyPatch, budget: int, largest: int) -> None:
    on_gpu = replace(SITE, device=torch.device("cuda", 0))
    monkeypatch.setattr(pairs, "_can_cut_products", lambda _: True)
    beside = [pair.first for pair in pair_tasks(on_gpu, budget, 132) if pair.mechanism is Mechanism.BESIDE]
    sizes = [task.num_tokens for task in beside if task.operation == "o_proj"]
    assert max(sizes) == largest and len(sizes) == len(set(sizes)) and {256, 512} <= set(sizes)
    monkeypatch.setattr(carry, "can_carry", lambda *_: True)
    monkeypatch.setattr(carry, "kernels_for", lambda *_: {OpKind.LINEAR_SWIGLU})
    carried = carry_tasks(on_gpu, Sizes(max_tokens=budget), 132)
    assert max(task.num_tokens for task in carried) == largest
    rates = [task.steps for task in carried if task.num_tokens == largest and not task.is_empty]
    assert rates == [2, 3, 4] and len({task.key for task in carried}) == len(carried)


def test_products_are_not_filled_with_more_keys_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 tokens of Llama-3-8B carry 1,424 requests of 1,280 keys at every 4 k-steps, 7 GiB, and 14 at every 2."""
    llama = Site(
        graph=build_graph(preset_config("llama-3-8b"), None),
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        page_size=16,
    )
    monkeypatch.setattr(carry, "can_carry", lambda *_: True)
    monkeypatch.setattr(carry, "kernels_for", lambda *_: {OpKind.LINEAR_SWIGLU})
    for max_cache_bytes, largest in ((16 << 30, [2, 3, 4]), (8 << 30, [4])):
        found = carry_tasks(llama, Sizes(max_tokens=8192, max_cache_bytes=max_cache_bytes), 132)
        full = [task for task in found if not task.is_empty]
        steps = {size: [task.steps for task in full if task.num_tokens == size] for size in (1024, 2048, 4096)}
        assert steps == {1024: [2, 3, 4], 2048: [2, 3, 4], 4096: largest}
        assert max(cache_bytes(llama, task.attention) for task in full) <= max_cache_bytes


def test_what_a_smaller_budget_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    first = run_job(job(path), path)
    larger = new_job(
        "tiny",
        CONFIG,
        device=torch.device("cpu"),
        dtype=torch.float32,
        sizes=replace(SIZES, max_tokens=64),
        path=path,
        only="alone",
    )
    fresh = {task.key for task in larger.wanted().alone}
    assert fresh and not fresh & {point.key for point in first.points}
    whole = run_job(larger, path)
    assert whole.points[: len(first.points)] == first.points
    assert {point.key for point in whole.points} == fresh | {point.key for point in first.points}


@pytest.mark.parametrize(
    ("only", "has_alone", "mechanisms", "has_parts"),
    [
        (None, True, {"stream", "partition", "beside", "inside"}, True),
        ("alone", True, set(), False),
        ("pairs", False, {"stream", "partition", "beside", "inside"}, True),
        ("stream", False, {"stream"}, False),
        ("partition", False, {"partition"}, True),
        ("beside", False, {"beside"}, False),
        ("inside", False, {"inside"}, False),
    ],
)
def test_only_a_part_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    only: str | None,
    has_alone: bool,
    mechanisms: set[str],
    has_parts: bool,
) -> None:
    product, attention = Task(operation="o_proj", num_tokens=600), Task(operation="a", num_tokens=9, num_requests=9)
    apart = (Mechanism.STREAM, Mechanism.BESIDE)
    found = [
        *(PairTask(first=product, second=attention, mechanism=mechanism) for mechanism in apart),
        PairTask(first=product, second=attention, mechanism=Mechanism.PARTITION, second_sms=16),
    ]
    carried = CarryTask(num_tokens=600, steps=4, attention=attention)
    for module in (pairs, profile):
        monkeypatch.setattr(module, "pair_tasks", lambda *_: found)
    monkeypatch.setattr(profile, "carry_tasks", lambda *_: [carried])
    begun = job(tmp_path / "profile.json")
    on_gpu = replace(begun.profile, setup=replace(begun.profile.setup, num_sms=132))
    wanted = replace(begun, profile=on_gpu, only=only).wanted()
    assert bool(wanted.alone) == has_alone and bool(wanted.parts) == has_parts
    assert {pair.mechanism.value for pair in wanted.pairs} == mechanisms - {"inside"}
    assert wanted.carried == ([carried] if "inside" in mechanisms else [])


def test_parts_are_both_sides_of_every_pair_and_products_at_smaller_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    product, attention = Task(operation="o_proj", num_tokens=600), Task(operation="a", num_tokens=9, num_requests=9)
    found = [
        PairTask(first=product, second=attention, mechanism=Mechanism.STREAM),
        *(
            PairTask(first=product, second=attention, mechanism=Mechanism.PARTITION, second_sms=count)
            for count in (16, 24)
        ),
        PairTask(first=product, second=attention, mechanism=Mechanism.BESIDE),
    ]
    monkeypatch.setattr(pairs, "pair_tasks", lambda *_: found)
    parts = pairs.part_tasks(SITE, 2048, 132)
    assert [(part.task.operation, part.task.num_tokens, part.num_sms, part.is_first) for part in parts] == [
        *(("o_proj", 256, count, True) for count in (116, 108)),
        *(("o_proj", 512, count, True) for count in (116, 108)),
        *(("o_proj", 600, count, True) for count in (116, 108)),
        *(("a", 9, count, False) for count in (16, 24)),
    ]


def test_counts_let_both_lanes_end_together() -> None:
    # Ten calls took 1 s on one lane and 0.5 s on the other: in 2 s they do 20 and 40.
    assert balanced_counts((10, 10), (1.0, 0.5), 2.0) == (20, 40)
    assert balanced_counts((1,), (5.0,), 1.0) == (1,)


def test_lanes_are_fed_in_turns() -> None:
    order = queue_order((2, 4))
    assert sorted(order) == [0, 0, 1, 1, 1, 1] and order == [1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(("num_tokens", "count"), [(8, 1), (512, 1), (2048, 4), (1000, 2), (1025, 5)])
def test_prefills_are_equal_chunks(num_tokens: int, count: int) -> None:
    assert num_chunks(num_tokens, 512) == count


def test_the_link_to_the_host_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(device: torch.device, span: Span | None = None) -> float:
        asked.append(device.type)
        return 5e9

    monkeypatch.setattr(profile, "measure_alone", lambda *_: iter(()))
    path = tmp_path / "profile.json"
    assert run_job(job(path), path).host_link_bytes_per_s is None, "a CPU has none"
    monkeypatch.setattr(profile, "host_link_bytes_per_s", measured)
    assert run_job(job(path), path).host_link_bytes_per_s == 5e9
    assert run_job(job(path), path) == Profile.load(path) and Profile.load(path).host_link_bytes_per_s == 5e9
    assert asked == ["cpu"]
