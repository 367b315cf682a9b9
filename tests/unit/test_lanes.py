"""Lanes beside each other, as far as they go without a GPU: what is asked of the driver, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow.executor import lanes as executor_lanes
from nanoflow.executor import streams as lanes
from nanoflow.executor.buffers import Workspace
from nanoflow.executor.lanes import GpuLanes, Partitions
from nanoflow.executor.steps import bind
from nanoflow.executor.streams import Carveout, LaneError, LaneStream, beside_pair
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.models.config_json import parse
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from tests.graphs import device_model
from tests.plans import experts_beside_plan, ping_pong_plan

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Status(IntEnum):
    """Of the driver's functions."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class FakeDriver:
    """The driver's names that are used, with its numbers; it refuses function 13."""

    CUresult = Status
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9)
    CUshared_carveout = SimpleNamespace(CU_SHAREDMEM_CARVEOUT_MAX_SHARED=100)

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[Status]:
        self.calls.append((function, attribute, value))
        return (Status.CUDA_ERROR_INVALID_VALUE if function == 13 else Status.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    pytest.importorskip("triton")
    fake = FakeDriver()
    monkeypatch.setattr(lanes, "_driver", lambda _device: fake)
    return fake


def launch(function: int) -> None:
    """What Triton calls before it launches a kernel."""
    # Not above: other tests set Triton's interpreter up before they import it.
    from triton import knobs
    from triton.compiler.compiler import LazyDict

    knobs.runtime.launch_enter_hook(LazyDict({"name": "kernel", "function": function, "stream": 0}))


def test_kernels_launched_within_are_asked_for_the_largest_carveout_once(driver: FakeDriver) -> None:
    carveout = Carveout(GPU)
    launch(3)
    with carveout.open():
        launch(4)
        launch(5)
        launch(4)
    launch(6)
    with carveout.open():
        launch(5)
        launch(7)
    assert driver.calls == [(4, 9, 100), (5, 9, 100), (7, 9, 100)]


def test_one_within_another_leaves_it_open(driver: FakeDriver) -> None:
    carveout = Carveout(GPU)
    with carveout.open():
        with carveout.open():
            launch(4)
        launch(5)
    launch(6)
    assert [function for function, _, _ in driver.calls] == [4, 5]


def test_it_is_closed_after_an_error_too(driver: FakeDriver) -> None:
    with pytest.raises(KeyError), Carveout(GPU).open():
        raise KeyError
    launch(4)
    assert not driver.calls


def test_what_the_driver_refuses_is_one_line(driver: FakeDriver) -> None:
    with (
        Carveout(GPU).open(),
        pytest.raises(LaneError, match="cuFuncSetAttribute says CUDA_ERROR_INVALID_VALUE") as error,
    ):
        launch(13)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [Carveout, beside_pair])
def test_a_cpu_has_no_such_lanes(make: Callable[[torch.device], Any]) -> None:
    with pytest.raises(LaneError, match="'cpu' has no SMs") as error:
        make(CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("missing", "advice"), [("cuda", "need cuda-python: pip install"), ("triton", "need kernels in Triton")]
)
def test_missing_packages_are_named(missing: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object | None:
        return None if name.split(".")[0] == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib, "import_module", lambda _name: FakeDriver())
    with pytest.raises(LaneError, match=advice) as error:
        Carveout(GPU)
    assert "\n" not in str(error.value)


def test_a_pair_is_made_once_and_its_kernels_open_the_carveout(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lane has kernels of its own, since products of both would share a workspace."""
    pairs: list[tuple[LaneStream, LaneStream]] = []
    kept: list[int] = []

    def pair(_device: torch.device) -> tuple[LaneStream, LaneStream]:
        pairs.append((fake_lane(Mechanism.BESIDE), fake_lane(Mechanism.BESIDE)))
        return pairs[-1]

    def kernels_beside(kernels: dict[OpKind, Callable[[Launch], None]], num_sms: int) -> Any:
        kept.append(num_sms)
        function = len(kept)
        return {**kernels, OpKind.LINEAR: lambda _launch: launch(function)}

    monkeypatch.setattr(executor_lanes, "beside_pair", pair)
    monkeypatch.setattr(executor_lanes, "kernels_beside", kernels_beside)
    partitions = Partitions(GPU, REFERENCE_KERNELS)
    sides = [partitions.beside(is_first=is_first) for is_first in (True, False, True)]
    assert len(pairs) == 1 and kept == [132, 132]
    assert [lane for lane, _ in sides] == [pairs[0][0], pairs[0][1], pairs[0][0]]
    assert sides[0][1] is sides[2][1] and sides[0][1].keys() == REFERENCE_KERNELS.keys()
    for _, kernels in sides:
        kernels[OpKind.LINEAR](None)  # type: ignore[arg-type]
    launch(3)
    assert driver.calls == [(1, 9, 100), (2, 9, 100)]


def fake_lane(mechanism: Mechanism) -> LaneStream:
    return LaneStream(mechanism=mechanism, stream=object(), num_sms=132, share=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("mechanism", [Mechanism.PARTITION, Mechanism.BESIDE, Mechanism.STREAM])
def test_lanes_are_opened_as_the_plan_says(mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are on the first side; the lane on the whole device is not opened."""
    opened: list[tuple[Mechanism, float | None, bool | None]] = []

    class FakePartitions(Partitions):
        def side(self, share: float, *, is_first: bool) -> Any:
            opened.append((Mechanism.PARTITION, share, is_first))
            return fake_lane(Mechanism.PARTITION), REFERENCE_KERNELS

        def beside(self, *, is_first: bool) -> Any:
            opened.append((Mechanism.BESIDE, None, is_first))
            return fake_lane(Mechanism.BESIDE), REFERENCE_KERNELS

    def plain_stream(_device: torch.device) -> LaneStream:
        opened.append((Mechanism.STREAM, None, None))
        return fake_lane(Mechanism.STREAM)

    monkeypatch.setattr(executor_lanes, "plain_stream", plain_stream)
    monkeypatch.setattr(executor_lanes, "_event", object)
    graph = build_graph(parse(CONFIG), None)
    plan = ping_pong_plan(graph, 8, 4, mechanism, share=0.75)
    workspace = Workspace.allocate(device_model(graph, 1), num_tokens=8, num_logits=1)
    GpuLanes(plan, bind(plan, graph), workspace, FakePartitions(CPU, REFERENCE_KERNELS))
    expected = {
        Mechanism.PARTITION: [(mechanism, 0.75, True), (mechanism, 0.25, False)],
        Mechanism.BESIDE: [(mechanism, None, True), (mechanism, None, False)],
        Mechanism.STREAM: [(mechanism, None, None)] * 2,
    }
    assert opened == expected[mechanism]


def test_a_lane_of_experts_alone_is_that_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As searches plan it: other products take the whole device, and attention the rest beside the experts."""
    opened: dict[float, bool] = {}

    class FakePartitions(Partitions):
        def side(self, share: float, *, is_first: bool) -> Any:
            opened[share] = is_first
            return fake_lane(Mechanism.PARTITION), REFERENCE_KERNELS

    monkeypatch.setattr(executor_lanes, "_event", object)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1}
    graph = build_graph(parse({**CONFIG, **experts, "architectures": ["MixtralForCausalLM"]}), None)
    plan = experts_beside_plan(graph, 8, 4, share=0.75)
    workspace = Workspace.allocate(device_model(graph, 1), num_tokens=8, num_logits=1)
    GpuLanes(plan, bind(plan, graph), workspace, FakePartitions(CPU, REFERENCE_KERNELS))
    assert opened == {0.75: True, 0.25: False}


def test_an_executor_gives_its_sms_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of lanes is made once for all plans, and both are closed, once."""
    closed: list[Mechanism] = []

    def partition_pair(_device: torch.device, _share: float) -> tuple[LaneStream, LaneStream]:
        pair = fake_lane(Mechanism.PARTITION), fake_lane(Mechanism.PARTITION)
        for lane in pair:
            lane.stream = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
            lane._release = lambda lane=lane: closed.append(lane.mechanism)
        return pair

    monkeypatch.setattr(executor_lanes, "partition_pair", partition_pair)
    monkeypatch.setattr(executor_lanes, "count_sms", lambda _device: 132)
    monkeypatch.setattr(executor_lanes, "kernels_on", lambda kernels, _count: kernels)
    partitions = Partitions(GPU, REFERENCE_KERNELS)
    for is_first in (True, False):
        partitions.side(0.75 if is_first else 0.25, is_first=is_first)
    for _ in range(2):
        partitions.close()
    assert closed == [Mechanism.PARTITION] * 2
