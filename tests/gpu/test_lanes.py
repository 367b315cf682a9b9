"""Lanes on a GPU, eagerly and in CUDA graphs: each of a partition keeps to its own SMs, those beside share all SMs."""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings")

import triton
import triton.language as tl

from nanoflow.executor.streams import Carveout, LaneError, LaneStream, beside_pair, partition_pair, plain_stream
from nanoflow.kernels.hopper import has_gluon
from nanoflow.plan.mechanisms import Mechanism

pytestmark = pytest.mark.gpu
_BLOCKS = 4096
# Shared memory of a product and of decode attention that fit on a Hopper SM together, and of one that does not fit.
_FIRST_KIB, _SECOND_KIB, _TOO_MUCH_KIB = 153, 67, 80
# Far longer than it takes to launch two kernels.
_LASTING_NS = 3_000_000
# The device may take two programs of one kernel to an SM, so that one of the other has none there.
_MOST_SMS = 0.9
needs_hopper = pytest.mark.skipif(
    torch.cuda.get_device_capability()[0] != 9 or not has_gluon(), reason="sizes and kernel are for Hopper"
)


@triton.jit
def _write_sm(out: tl.tensor, spin: int) -> None:
    """Writes each program's SM, after some work, so that no SM can take all programs."""
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    kept = sm
    for _ in range(spin):
        kept = kept * 1664525 + 1013904223
    # One value in 2^32; it keeps the loop from being optimised away.
    tl.store(out + tl.program_id(0), tl.where(kept == -2147483647, sm + 1000, sm))


def sms_of(out: torch.Tensor) -> set[int]:
    torch.cuda.synchronize()
    return set(out.tolist())


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def pair(device: torch.device) -> Iterator[tuple[LaneStream, LaneStream]]:
    first, second = partition_pair(device, 0.64)
    with closing(first), closing(second):
        yield first, second


def test_lanes_are_disjoint_and_complete(pair: tuple[LaneStream, LaneStream], device: torch.device) -> None:
    seen = []
    for lane in pair:
        out = torch.full((_BLOCKS,), -1, dtype=torch.int32, device=device)
        torch.cuda.synchronize()
        with torch.cuda.stream(lane.stream):
            _write_sm[(_BLOCKS,)](out, 2000)
        lane.stream.synchronize()
        seen.append(sms_of(out))
    assert [len(sms) for sms in seen] == [lane.num_sms for lane in pair]
    assert not seen[0] & seen[1]
    total = torch.cuda.get_device_properties(device).multi_processor_count
    assert pair[0].num_sms + pair[1].num_sms == total
    assert pair[0].share + pair[1].share == pytest.approx(1.0)


def test_graphs_keep_to_the_lane_they_were_captured_on(
    pair: tuple[LaneStream, LaneStream], device: torch.device
) -> None:
    seen = []
    for lane in pair:
        out = torch.full((_BLOCKS,), -1, dtype=torch.int32, device=device)
        with torch.cuda.stream(lane.stream):
            _write_sm[(_BLOCKS,)](out, 2000)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=lane.stream):
            _write_sm[(_BLOCKS,)](out, 2000)
        out.fill_(-1)
        torch.cuda.synchronize()
        with torch.cuda.stream(lane.stream):
            graph.replay()
        lane.stream.synchronize()
        seen.append(sms_of(out))
    assert [len(sms) for sms in seen] == [lane.num_sms for lane in pair]
    assert not seen[0] & seen[1]


def test_a_plain_stream_has_all_sms(device: torch.device) -> None:
    lane = plain_stream(device)
    out = torch.full((_BLOCKS,), -1, dtype=torch.int32, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(lane.stream):
        _write_sm[(_BLOCKS,)](out, 2000)
    assert len(sms_of(out)) == lane.num_sms == torch.cuda.get_device_properties(device).multi_processor_count


def test_closing_gives_the_sms_back_and_may_be_done_twice(device: torch.device) -> None:
    for _ in range(20):
        for lane in partition_pair(device, 0.5):
            lane.close()
            lane.close()


@pytest.mark.parametrize("share", [0.0, 0.999])
def test_a_share_that_cannot_be_had_is_refused(device: torch.device, share: float) -> None:
    with pytest.raises(LaneError, match=r"SMs, in groups of 8, leaves a lane with none"):
        partition_pair(device, share)


def run_beside(pair: tuple[LaneStream, LaneStream], outs: list[torch.Tensor], kib: list[int], order: list[int]) -> None:
    """Two kernels that hold shared memory, one program an SM each, queued in some order of the lanes."""
    from tests.sm_record import record

    for lane in order:
        with torch.cuda.stream(pair[lane].stream):
            record(outs[lane], kib[lane], _LASTING_NS)


def empty_records(pair: tuple[LaneStream, LaneStream], device: torch.device) -> list[torch.Tensor]:
    outs = [torch.zeros((lane.num_sms, 3), dtype=torch.int64, device=device) for lane in pair]
    torch.cuda.synchronize()
    return outs


def count_shared_sms(outs: list[torch.Tensor]) -> int:
    from tests.sm_record import shared_sms

    torch.cuda.synchronize()
    assert all((out[:, 2] - out[:, 1] >= _LASTING_NS).all() for out in outs)
    return len(shared_sms(*outs))


def test_a_pair_beside_each_other_has_all_sms_and_places_the_second_first(device: torch.device) -> None:
    first, second = beside_pair(device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    for lane in (first, second):
        assert (lane.mechanism, lane.num_sms, lane.share) == (Mechanism.BESIDE, num_sms, 1.0)
    assert first.stream != second.stream and second.stream.priority < first.stream.priority


@needs_hopper
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["large first", "small first"])
def test_kernels_beside_each_other_share_sms(device: torch.device, order: list[int]) -> None:
    pair, carveout, kib = beside_pair(device), Carveout(device), [_FIRST_KIB, _SECOND_KIB]
    # The first time they are compiled and loaded, one after the other.
    for _ in range(2):
        outs = empty_records(pair, device)
        with carveout.open():
            run_beside(pair, outs, kib, order)
    assert count_shared_sms(outs) >= _MOST_SMS * pair[0].num_sms


@needs_hopper
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["large first", "small first"])
def test_graphs_share_sms(device: torch.device, order: list[int]) -> None:
    """The carve-out is opened while they are captured, of kernels that are loaded: these sizes occur here only."""
    pair, carveout = beside_pair(device), Carveout(device)
    kib = [_FIRST_KIB - 1 - order[0], _SECOND_KIB - 1 - order[0]]
    outs = empty_records(pair, device)
    run_beside(pair, outs, kib, order)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturing = torch.cuda.current_stream(device)
        for lane in pair:
            lane.stream.wait_stream(capturing)
        with carveout.open():
            run_beside(pair, outs, kib, order)
        for lane in pair:
            capturing.wait_stream(lane.stream)
    for _ in range(3):
        for out in outs:
            out.zero_()
        torch.cuda.synchronize()
        graph.replay()
        assert count_shared_sms(outs) >= _MOST_SMS * pair[0].num_sms


@needs_hopper
def test_kernels_that_do_not_fit_share_none(device: torch.device) -> None:
    """What is counted above can be nothing."""
    pair, carveout = beside_pair(device), Carveout(device)
    for _ in range(2):
        outs = empty_records(pair, device)
        with carveout.open():
            run_beside(pair, outs, [_FIRST_KIB, _TOO_MUCH_KIB], [0, 1])
    assert count_shared_sms(outs) == 0
