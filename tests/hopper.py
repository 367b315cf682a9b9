"""A simulation of Gluon for Hopper in which the programs of `kernels/hopper` run on the CPU.

Partitions are threads. Barriers in shared memory count arrivals, bytes and phases as on Hopper. A product is computed
when it is waited for, not when it is issued. It fails if its inputs have changed since, or if its result is used
before. So slots, phases, the order of waits, the division of work and the results are tested; layouts and instructions
are not.
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

from nanoflow.graph.operation import KEY_BLOCK, AttentionDims
from nanoflow.kernels.hopper import (
    attention_fp8_programs,
    attention_programs,
    carry_attention,
    carry_product,
    carry_programs,
    loads,
    rings,
    walk,
)
from nanoflow.kernels.hopper.attention_programs import PAGE_TOKENS, PANEL
from nanoflow.kernels.launch import Launch
from tests.hopper_memory import Barrier, Barriers, Number, Pending, Pointer, Shared, Stuck, Values, unloaded

# How long a thread rests after it has arrived at a barrier.
ARRIVAL_S = 2e-4
MODULES = (
    rings,
    walk,
    loads,
    attention_programs,
    attention_fp8_programs,
    carry_attention,
    carry_product,
    carry_programs,
)


@dataclass
class Machine:
    """Runs one program: its memory, its threads, and their running products.

    Attributes:
        loads: How often each box was loaded, by tensor and first element.
        barriers: All barriers.
        under_way: Running products of each thread, oldest first.
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
        return Shared(unloaded(tuple(shape), dtype))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.add(count, 0)
            # A waiting thread goes on at once, which exposes arrivals that are too early.
            time.sleep(ARRIVAL_S)

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        barrier.add(1, num_bytes)

    def load_box(self, box: tuple[Tensor, Sequence[int]], cell: Sequence[int], barrier: Barrier, tile: Shared) -> None:
        tensor, shape = box
        assert tuple(shape) == tuple(tile.cells.shape)
        # Memory has a latency, which exposes missing waits.
        time.sleep(5e-5)
        row, column = (int(place) for place in cell)
        self.loads[tensor.data_ptr(), (row, column)] += 1
        # Rows and columns outside the tensor are zeros.
        tile.cells.zero_()
        there = tensor[row : row + shape[0], column : column + shape[1]]
        tile.cells[: there.shape[0], : there.shape[1]] = there
        with self.changed:
            assert barrier.num_bytes > 0, "bytes that nobody expects"
        barrier.add(0, -tile.cells.nbytes)

    def multiply(
        self, left: Shared | Tensor, right: Shared, acc: Any, *, use_acc: bool = True, is_async: bool
    ) -> Pending:
        assert is_async
        product = Pending(left if isinstance(left, Shared) else Shared(left), right, acc, bool(use_acc))
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
        """One of the functions, with every name that it and the others use bound to the simulation."""
        names: dict[str, Any] = {"__builtins__": __builtins__}
        for module in MODULES:
            for key, value in vars(module).items():
                if isinstance(value, triton.language.constexpr):
                    names[key] = value.value
                elif getattr(value, "__triton_aggregate__", False):
                    names[key] = _aggregate(value, names)
                elif callable(getattr(value, "fn", None)):
                    names[key] = _bound(value, names)
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
        layouts = ["Blocked", "Slice", "DistributedLinear", "DotOperand", "NVMMADistributed"]
        layouts += ["NVMMAShared", "SwizzledShared"]
        return types.SimpleNamespace(
            **{f"{name}Layout": lambda *_, **__: None for name in layouts},
            float8e4nv=torch.float8_e4m3fn,
            float16=torch.float16,
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
            constexpr=lambda value: value,
            arange=lambda start, stop, _: torch.arange(start, stop),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype).as_subclass(Values),
            full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
            where=lambda choice, a, b: _where(choice, a, b) if isinstance(choice, Tensor) else (a if choice else b),
            join=lambda a, b: torch.stack((a, b), -1).as_subclass(Values),
            abs=torch.abs,
            floor=torch.floor,
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
    """Replaces a compiled program: runs all programs of a launch one after the other.

    Attributes:
        program: The program.
        loads: Sum of the loads of all launches.
    """

    program: Any
    loads: Counter[tuple[int, tuple[int, ...]]] = field(default_factory=Counter)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*values: Any, num_warps: int, maxnreg: int | None = None, **constants: Any) -> None:
            assert num_warps == 4
            bound = inspect.signature(self.program.fn).bind(*values, **constants).arguments
            arguments = {name: _stand_in(value) for name, value in bound.items()}
            for program in range(grid[0]):
                machine = Machine(program, grid[0])
                machine.function(self.program.fn.__name__)(**arguments)
                self.loads += machine.loads
                # At the end no product is running and no barrier is waited for or partly counted.
                assert not any(machine.under_way.values())
                assert all(barrier.missing == barrier.count and not barrier.num_bytes for barrier in machine.barriers)

        return launch


def assert_loaded_once(launch: Launch, loads: Counter[tuple[int, tuple[int, ...]]]) -> None:
    """Check that each block of each head of the launch's rows was loaded, and nothing else."""
    cache, decodes, dims = launch.cache, launch.inputs.decodes, launch.op.dims
    assert cache is not None and isinstance(dims, AttentionDims)
    expected: Counter[tuple[int, ...]] = Counter()
    for row in range(launch.tokens.start, launch.tokens.stop):
        context = int(decodes.context_len[row])
        for page in range(-(-context // KEY_BLOCK) * (KEY_BLOCK // PAGE_TOKENS)):
            at = int(launch.pages.decode_tables[row, min(page, (context - 1) // PAGE_TOKENS)])
            for head in range(dims.num_kv_heads):
                for column in range(0, dims.head_dim, PANEL if cache.scales is None else dims.head_dim):
                    expected[(at * dims.num_kv_heads + head) * PAGE_TOKENS, column] += 1
    for tensor in (cache.keys, cache.values):
        assert {place: num for (where, place), num in loads.items() if where == tensor.data_ptr()} == expected
    if cache.scales is not None:
        words = Counter({(row // PAGE_TOKENS, column): num for (row, column), num in expected.items()})
        where_scales = cache.scales.data_ptr()
        assert {place: num for (where, place), num in loads.items() if where == where_scales} == words


def _bound(function: Any, names: dict[str, Any]) -> types.FunctionType:
    """The functions that Triton would compile, by name."""
    return types.FunctionType(function.fn.__code__, names, function.fn.__name__, function.fn.__defaults__)


def _aggregate(compiled: Any, names: dict[str, Any]) -> type:
    """A stand-in for a class that only exists while Triton compiles; each field is written once."""

    def write_once(self: object, name: str, value: object) -> None:
        assert not hasattr(self, name)
        object.__setattr__(self, name, value)

    constructor, *methods = compiled.hash_attrs
    found = {method.fn.__name__: _bound(method, names) for method in methods}
    return type(compiled.__name__, (), {"__init__": _bound(constructor, names), "__setattr__": write_once, **found})


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


def _where(choice: Tensor, a: Any, b: Any) -> Tensor:
    if isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn:
        return torch.where(choice, a.float(), b).to(a.dtype)
    return torch.where(choice, a, b)


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
