"""Partitions of a GPU: each lane keeps to its own SMs, eagerly and in CUDA graphs."""

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

from nanoflow.device.lanes import LaneError, LaneStream, partition_pair, plain_stream

pytestmark = pytest.mark.gpu
_BLOCKS = 4096


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
