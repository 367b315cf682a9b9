"""A kernel whose programs record on which SM they ran and when, to see which ones ran together."""

# mypy: allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Elements in a KiB of shared memory.
KIB_ITEMS = 256
_KIB: gl.constexpr = gl.constexpr(KIB_ITEMS)
NUM_WARPS = 4


@gluon.jit
def _time_ns() -> gl.tensor:
    return gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit(do_not_specialize=["lasting_ns"])
def record_program(out: gl.tensor, lasting_ns: int, NUM_KIB: gl.constexpr, WARPS: gl.constexpr) -> None:
    """out [programs, 3]: SM, begin and end in nanoseconds."""
    begin = _time_ns()
    sm = gl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    cells = gl.allocate_shared_memory(gl.int32, [NUM_KIB, _KIB], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # The last element is read again at the end, so that the memory is held until then.
    held = cells.index(NUM_KIB - 1)
    held.store(gl.full([_KIB], 1, gl.int32, layout) * sm)
    end = _time_ns()
    while end - begin < lasting_ns:
        end = _time_ns()
    place = out + gl.program_id(0) * 3
    gl.store(place, gl.max(held.load(layout), 0).to(gl.int64))
    gl.store(place + 1, begin)
    gl.store(place + 2, end)


def record(out: torch.Tensor, num_kib: int, lasting_ns: int) -> None:
    """One program for each row of int64 `out` [programs, 3]: SM, begin, and end at least `lasting_ns` later."""
    record_program[(len(out),)](out, lasting_ns, NUM_KIB=num_kib, WARPS=NUM_WARPS, num_warps=NUM_WARPS)


def shared_sms(first: torch.Tensor, second: torch.Tensor) -> set[int]:
    """SMs on which programs of both records ran at the same time."""
    return {
        sm
        for sm, begin, end in first.tolist()
        for other, other_begin, other_end in second.tolist()
        if sm == other and max(begin, other_begin) < min(end, other_end)
    }
