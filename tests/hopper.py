"""Stand-ins for what a Gluon program for Hopper calls, so that `carry_programs.py` runs on the CPU.

Its partitions are threads. Barriers in shared memory count arrivals, bytes and phases as Hopper's do; a product takes
place when it is waited for, not when it is issued, and finds its factors unchanged or fails; nothing else can be done
with its result before that. So slots, phases, the order of waits and the cut of the work are tested as they are
written, and what is computed; layouts and instructions are not.
"""

from __future__ import annotations

import inspect
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from nanoflow.kernels.hopper import carry_attention, carry_product, carry_programs

TIMEOUT_S = 20.0


class Stuck(Exception):
    """A partition waited in vain."""


class Number(int):
    """A scalar in registers."""

    def to(self, _: torch.dtype) -> Number:
        return self


def _stays_number(name: str) -> None:
    of_int = getattr(int, name)

    def method(self: Number, other: Any) -> Any:
        value = of_int(self, other)
        return value if value is NotImplemented else Number(value)

    setattr(Number, name, method)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _stays_number(f"__{_name}__")
    _stays_number(f"__r{_name}__")


class Values(Tensor):
    """A tensor in registers."""

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.unbind(-1)


class Barrier:
    """One word of shared memory that counts arrivals and bytes of its phase."""

    def __init__(self, changed: threading.Condition) -> None:
        self.changed, self.count, self.missing, self.num_bytes, self.phase = changed, 0, 0, 0, 0

    def add(self, arrivals: int, num_bytes: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.num_bytes += num_bytes
            assert self.missing >= 0
            if self.missing == 0 and self.num_bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        assert parity in (0, 1)
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != parity, TIMEOUT_S):
                raise Stuck


@dataclass(frozen=True)
class Shared:
    """Memory of a program, or a part of it; infinite before anything is written there."""

    cells: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.cells.dtype

    def index(self, place: int) -> Shared:
        assert 0 <= place < len(self.cells)
        return Shared(self.cells[place])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.cells.narrow(0, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.cells.permute(*order))

    def load(self, _: object) -> Tensor:
        return self.cells.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        self.cells.copy_(value)


@dataclass(frozen=True)
class Barriers:
    """An array of them in shared memory."""

    items: tuple[Barrier, ...]

    def index(self, place: int) -> Barrier:
        return self.items[place]


@dataclass(frozen=True)
class Pointer:
    """Cells of a tensor in memory, at these offsets; a launch writes each once at most."""

    memory: Tensor
    is_written: Tensor
    offset: Any = 0

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.is_written, self.offset + other)

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)


class Pending:
    """A product that is under way."""

    def __init__(self, left: Shared, right: Shared, acc: Any, has_acc: bool) -> None:
        self.left, self.right, self.acc, self.has_acc = left, right, acc, has_acc
        self.factors = (left.cells.clone(), right.cells.clone())
        self.value: Tensor | None = None

    def finish(self) -> None:
        for before, now in zip(self.factors, (self.left.cells, self.right.cells), strict=True):
            assert not before.isinf().any(), "a factor was never loaded"
            assert torch.equal(before.view(torch.int16), now.view(torch.int16)), "a factor was overwritten"
        acc: Any = self.acc.value if isinstance(self.acc, Pending) else self.acc
        product = self.factors[0].float() @ self.factors[1].float()
        self.value = acc + product if self.has_acc else product


@dataclass
class Machine:
    """Runs one program: its memory, its threads, and what they have under way.

    Attributes:
        loads: How often each box was loaded, by tensor and first cell.
        barriers: All there are.
        under_way: Products of each thread, oldest first.
    """

    program: int
    num_programs: int
    loads: Counter[tuple[int, tuple[int, ...]]] = field(default_factory=Counter)
    barriers: list[Barrier] = field(default_factory=list)
    under_way: dict[int, list[Pending]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared | Barriers:
        if dtype == torch.int64:
            items = tuple(Barrier(self.changed) for _ in range(shape[0]))
            self.barriers += items
            return Barriers(items)
        return Shared(torch.full(tuple(shape), torch.inf, dtype=dtype))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.add(count, 0)
            # Whoever waits for it goes on at once, so that what came too early shows.
            time.sleep(2e-4)

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        barrier.add(1, num_bytes)

    def load_box(self, box: tuple[Tensor, Sequence[int]], cell: Sequence[int], barrier: Barrier, tile: Shared) -> None:
        tensor, shape = box
        assert tuple(shape) == tuple(tile.cells.shape)
        # Memory is slow to answer, so that a wait that is missing shows.
        time.sleep(5e-5)
        row, column = (int(place) for place in cell)
        self.loads[tensor.data_ptr(), (row, column)] += 1
        # Rows and columns behind the last are zeros.
        tile.cells.zero_()
        there = tensor[row : row + shape[0], column : column + shape[1]]
        tile.cells[: there.shape[0], : there.shape[1]] = there
        with self.changed:
            assert barrier.num_bytes > 0, "bytes that nobody expects"
        barrier.add(0, -2 * tile.cells.numel())

    def multiply(self, left: Shared, right: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Pending:
        assert is_async
        product = Pending(left, right, acc, bool(use_acc))
        self.under_way.setdefault(threading.get_ident(), []).append(product)
        return product

    def wait_products(self, num_left: int, deps: Sequence[Any]) -> Any:
        products = self.under_way[threading.get_ident()]
        while len(products) > num_left:
            products.pop(0).finish()
        done = tuple(dep.value if isinstance(dep, Pending) and dep.value is not None else dep for dep in deps)
        return done if len(done) > 1 else done[0]

    def specialize(self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        errors: list[BaseException] = []

        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
        for step in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                step(thread)
        if errors:
            raise next((error for error in errors if not isinstance(error, Stuck)), errors[0])

    def function(self, name: str) -> Callable[..., Any]:
        """One of the functions, with every name that it and the others use bound to stand-ins."""
        names: dict[str, Any] = {"__builtins__": __builtins__}
        for module in (carry_attention, carry_product, carry_programs):
            for key, value in vars(module).items():
                if isinstance(value, triton.language.constexpr):
                    names[key] = value.value
                elif callable(getattr(value, "fn", None)):
                    names[key] = types.FunctionType(value.fn.__code__, names, key)
        names |= {
            "gl": self._language(),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=self.init,
                arrive=self.arrive,
                expect=self.expect,
                wait=lambda barrier, parity: barrier.wait(parity),
            ),
            "tma": types.SimpleNamespace(async_copy_global_to_shared=self.load_box),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_products,
        }
        function: Callable[..., Any] = names[name]
        return function

    def _language(self) -> types.SimpleNamespace:
        layouts = ("Blocked", "Slice", "NVMMADistributed", "NVMMAShared", "DistributedLinear")
        return types.SimpleNamespace(
            **{f"{name}Layout": lambda *_, **__: None for name in layouts},
            float32=torch.float32,
            int32=torch.int32,
            int64=torch.int64,
            program_id=lambda _: self.program,
            num_programs=lambda _: self.num_programs,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
            static_range=range,
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: _pick(torch.minimum, min, a, b),
            maximum=lambda a, b: _pick(torch.maximum, max, a, b),
            arange=lambda start, stop, _: torch.arange(start, stop),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype).as_subclass(Values),
            where=lambda choice, a, b: (
                torch.where(choice, a, b) if isinstance(choice, Tensor) else (a if choice else b)
            ),
            exp=torch.exp,
            exp2=torch.exp2,
            log2=torch.log2,
            max=lambda value, axis: value.amax(axis),
            sum=lambda value, axis: _scalar(value.sum(axis)),
            convert_layout=lambda value, _: value.clone(),
            load=_load,
            store=_store,
        )


@dataclass
class OnCpu:
    """In place of the compiled program: all programs of a launch, one after the other.

    Attributes:
        loads: Of all launches, as a machine counts them.
    """

    loads: Counter[tuple[int, tuple[int, ...]]] = field(default_factory=Counter)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*values: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4
            bound = inspect.signature(carry_programs.carry_program.fn).bind(*values, **constants).arguments
            arguments = {name: _stand_in(value) for name, value in bound.items()}
            for program in range(grid[0]):
                machine = Machine(program, grid[0])
                machine.function("carry_program")(**arguments)
                self.loads += machine.loads
                # Nothing is under way, expected or half counted at the end.
                assert not any(machine.under_way.values())
                assert all(barrier.missing == barrier.count and not barrier.num_bytes for barrier in machine.barriers)

        return launch


def _stand_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value, torch.zeros(value.shape, dtype=torch.bool))
    return (value.base, value.block_shape) if hasattr(value, "block_shape") else value


def _pick(of_tensors: Callable[..., Any], of_numbers: Callable[..., Any], a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
    return of_numbers(a, b)


def _scalar(value: Tensor) -> Any:
    return value if value.ndim else Number(value.item())


def _load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Any:
    cells, offsets = pointer.memory.view(-1), pointer.offset
    if mask is None:
        return _scalar(cells[offsets])
    mask = mask.expand(offsets.shape)
    return torch.where(mask, cells[torch.where(mask, offsets, 0)], other)


def _store(pointer: Pointer, value: Any, mask: Tensor | None = None) -> None:
    cells, is_written = pointer.memory.view(-1), pointer.is_written.view(-1)
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=cells.dtype)
    offsets = torch.as_tensor(pointer.offset).expand(value.shape)
    keep = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.expand(offsets.shape)
    assert value.dtype == cells.dtype
    assert not is_written[offsets[keep]].any(), "written twice"
    is_written[offsets[keep]] = True
    cells[offsets[keep]] = value[keep].as_subclass(Tensor)
