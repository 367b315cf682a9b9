"""A ring of slots in shared memory between loading and computing warps, in Gluon for Hopper.

`attention_programs.py` has rings of keys and values, `carry_programs.py` also of tiles of a product. Use n of a ring
(its n-th tile or block of keys) has slot n % STAGES, and is use u = n // STAGES of that slot. Both barriers of a slot
count phases from 0. A wait for parity p returns once the running phase has another parity than p, thus at once for
parity 1 on a fresh barrier.
- A loader waits for `empty` with parity (u & 1) ^ 1. For use 0 it returns at once; for use u > 0 it waits for the end
  of phase u - 1, which the readers' arrivals after use u - 1 complete. It cannot be two phases behind, as phase u needs
  use u to be loaded first.
- A reader waits for `full` with parity u & 1: for the end of phase u, completed by the one arrival of `expect` and its
  bytes. It cannot be two phases behind, as phase u + 1 needs the reader's own arrival after use u.
- `empty` expects one arrival from each warpgroup that reads the ring.

Gluon checks fields of an aggregate against their annotations, so these must be classes, not strings.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate


@aggregate
class Ring:
    """Barriers of the slots.

    Attributes:
        full, empty: int64 [STAGES, 1] in shared memory, one barrier for each slot.
        STAGES: Number of slots.
    """

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, full, empty, STAGES):
        self.full, self.empty, self.STAGES = full, empty, gl.constexpr(STAGES)

    @gluon.jit
    def init(self, READERS: gl.constexpr):
        """Initialize the barriers for READERS reading warpgroups."""
        for stage in gl.static_range(self.STAGES):
            mbarrier.init(self.full.index(stage), count=1)
            mbarrier.init(self.empty.index(stage), count=READERS)

    @gluon.jit
    def expect(self, use, num_bytes):
        """Wait until the slot of a use is empty; returns the barrier for loads of `num_bytes` bytes into it."""
        slot = use % self.STAGES
        mbarrier.wait(self.empty.index(slot), ((use // self.STAGES) & 1) ^ 1)
        bar = self.full.index(slot)
        mbarrier.expect(bar, num_bytes)
        return bar

    @gluon.jit
    def wait(self, use):
        """Wait until the slot of a use is full."""
        mbarrier.wait(self.full.index(use % self.STAGES), (use // self.STAGES) & 1)

    @gluon.jit
    def release(self, use, pred=True):
        """Say that this warpgroup no longer reads the slot of a use."""
        mbarrier.arrive(self.empty.index(use % self.STAGES), count=1, pred=pred)


@gluon.jit
def make_ring(STAGES: gl.constexpr):
    """A ring in shared memory; its barriers are not initialized yet."""
    full = _barriers(STAGES)
    return Ring(full, _barriers(STAGES), STAGES)


@gluon.jit
def make_two_rings(STAGES: gl.constexpr):
    """Two rings whose barriers are adjacent."""
    full0, full1 = _barriers(STAGES), _barriers(STAGES)
    empty0, empty1 = _barriers(STAGES), _barriers(STAGES)
    return Ring(full0, empty0, STAGES), Ring(full1, empty1, STAGES)


@gluon.jit
def init_two_rings(first, second):
    """Initialize the barriers of two rings of the same length, each read by one warpgroup."""
    for stage in gl.static_range(first.STAGES):
        mbarrier.init(first.full.index(stage), count=1)
        mbarrier.init(second.full.index(stage), count=1)
        mbarrier.init(first.empty.index(stage), count=1)
        mbarrier.init(second.empty.index(stage), count=1)


@gluon.jit
def _barriers(NUM: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
