"""The experiment's program, a product with decode attention inside it, run on the CPU by stand-ins for what it calls.

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

import pytest
import torch
import triton
from torch import Tensor

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

pytest.importorskip("triton.experimental.gluon")

from benchmarks.experiments import fused_attention
from benchmarks.experiments import fused_attention_programs as programs
from benchmarks.experiments.fused_attention import Cut, row_shares

from nanoflow.kernels.gluon_attention import merge_program

KV_HEADS, GROUP, HEAD_DIM, BLOCK, PAGE, PANEL = 2, 3, 128, 64, 16, 64
TIMEOUT_S = 20.0


class Stuck(Exception):
    """A partition waited in vain."""


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
    """Memory of a program, or a part of it."""

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
    """Cells of a tensor in memory, at these offsets."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

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
            assert torch.equal(before, now), "a factor was overwritten, or never loaded"
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
        return Shared(torch.full(tuple(shape), torch.nan, dtype=dtype))

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
        # Rows behind the last are zeros.
        tile.cells.zero_()
        there = tensor[row : row + shape[0], column : column + shape[1]]
        tile.cells[: len(there)] = there
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
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, Stuck)), errors[0])

    def run(self, **arguments: Any) -> None:
        """`fused_program` with every name that it and its functions use bound to stand-ins."""
        names: dict[str, Any] = {"__builtins__": __builtins__}
        for name, value in vars(programs).items():
            if isinstance(value, triton.language.constexpr):
                names[name] = value.value
            elif callable(getattr(value, "fn", None)):
                names[name] = types.FunctionType(value.fn.__code__, names, name)
        names |= {
            "gl": self.language(),
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
        names["fused_program"](**arguments)

    def language(self) -> types.SimpleNamespace:
        layouts = dict.fromkeys(
            (
                "BlockedLayout",
                "SliceLayout",
                "NVMMADistributedLayout",
                "NVMMASharedLayout",
                "DistributedLinearLayout",
            ),
            lambda *_, **__: None,
        )
        return types.SimpleNamespace(
            **layouts,
            float32=torch.float32,
            int32=torch.int32,
            int64=torch.int64,
            program_id=lambda _: self.program,
            num_programs=lambda _: self.num_programs,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
            static_range=range,
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: pick(torch.minimum, min, a, b),
            maximum=lambda a, b: pick(torch.maximum, max, a, b),
            arange=lambda start, stop, _: torch.arange(start, stop),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
            where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
            exp2=torch.exp2,
            log2=torch.log2,
            max=lambda value, axis: value.amax(axis),
            sum=lambda value, axis: scalar(value.sum(axis)),
            convert_layout=lambda value, _: value,
            load=lambda pointer: scalar(pointer.memory.view(-1)[pointer.offset]),
            store=store,
        )


def pick(of_tensors: Callable[..., Any], of_numbers: Callable[..., Any], a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
    return of_numbers(a, b)


def scalar(value: Tensor) -> Any:
    return value if value.ndim else value.item()


def store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    offsets = pointer.offset.expand(value.shape)
    keep = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.expand(offsets.shape)
    cells = pointer.memory.view(-1)
    assert value.dtype == cells.dtype
    assert cells[offsets[keep]].isnan().all(), "written twice"
    cells[offsets[keep]] = value[keep]


@dataclass(frozen=True)
class Problem:
    """A product [M, N] and requests with so many keys each, cut over so many programs."""

    num_programs: int
    shape: tuple[int, int]
    contexts: tuple[int, ...]
    first_row: int = 0
    rounds: int = 2
    steps: int = 4
    stages: int = 3
    kv_stages: int = 1
    has_product: bool = True


PROBLEMS = {
    "more tiles than blocks": Problem(2, (256, 192), (64, 320, 192)),
    "more blocks than k-steps": Problem(3, (128, 64), (640, 64, 128, 256), rounds=1),
    "rounds of two steps": Problem(2, (128, 128), (64, 64, 320), steps=2, stages=2),
    "rounds of eight, two slots": Problem(2, (256, 64), (128, 320), steps=8, stages=4, kv_stages=2, rounds=1),
    "rows from the second on, empty ones": Problem(2, (128, 128), (192, 0, 256, 0, 0, 64), first_row=1),
    "no rows": Problem(2, (128, 192), (), rounds=3),
    "no product": Problem(3, (128, 64), (320, 64, 640), has_product=False),
    "programs without any": Problem(4, (128, 128), (64,)),
    "tiles on some programs only": Problem(3, (128, 128), (640, 640, 320), rounds=3),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_product_and_attention_are_complete_and_right(problem: Problem) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_columns = problem.shape
    block_n = 64
    num_features = problem.rounds * problem.steps * PANEL

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    def unwritten(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    x, weight, out = random(num_rows, num_features), random(num_columns, num_features), unwritten(num_rows, num_columns)
    # Rows before and behind those of this call are of others.
    contexts = torch.tensor([64] * problem.first_row + list(problem.contexts) + [64], dtype=torch.int32)
    blocks = contexts // BLOCK
    key_blocks = torch.cat([torch.zeros(1, dtype=torch.int32), blocks.cumsum(0).int()])
    num_pages = contexts // PAGE
    ids = torch.randperm(int(num_pages.sum()), generator=generator).int()
    tables = torch.zeros(len(contexts), int(num_pages.max()), dtype=torch.int32)
    tables[torch.arange(tables.shape[1]) < num_pages[:, None]] = ids
    keys, values = (random(len(ids), KV_HEADS, PAGE, HEAD_DIM) for _ in range(2))
    q = random(len(contexts), KV_HEADS * GROUP, HEAD_DIM)
    attended = unwritten(len(contexts), KV_HEADS * GROUP, HEAD_DIM)
    num_parts = 2 * problem.num_programs
    parts = unwritten(2 * num_parts, 8, HEAD_DIM, dtype=torch.float32)
    log_sums = unwritten(2 * num_parts, 8, dtype=torch.float32)
    rows = range(problem.first_row, problem.first_row + len(problem.contexts))
    key_cells, value_cells = keys.view(-1, HEAD_DIM), values.view(-1, HEAD_DIM)
    loads: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for program in range(problem.num_programs):
        machine = Machine(program, problem.num_programs)
        machine.run(
            x=(x, (128, PANEL)),
            weight=(weight, (block_n, PANEL)),
            out=Pointer(out),
            num_tiles=num_rows // 128 * (num_columns // block_n) if problem.has_product else 0,
            tiles_m=num_rows // 128,
            num_rounds=problem.rounds,
            num_columns=num_columns,
            q=(q.view(-1, HEAD_DIM), (8, PANEL)),
            keys=(key_cells, (PAGE, PANEL)),
            values=(value_cells, (PAGE, PANEL)),
            attended=Pointer(attended),
            parts=Pointer(parts),
            log_sums=Pointer(log_sums),
            page_tables=Pointer(tables),
            context_len=Pointer(contexts),
            key_blocks=Pointer(key_blocks),
            table_stride=tables.shape[1],
            first_row=rows.start,
            num_rows=len(rows),
            log2_scale=HEAD_DIM**-0.5 * 1.4426950408889634,
            BLOCK_N=block_n,
            STEPS=problem.steps,
            STAGES=problem.stages,
            KV_STAGES=problem.kv_stages,
            GROUP=GROUP,
            KV_HEADS=KV_HEADS,
            SCAN=4,
            WORKER_REGISTERS=232,
        )
        loads += machine.loads
        # Nothing is under way, expected or half counted at the end.
        assert not any(machine.under_way.values())
        assert all(barrier.missing == barrier.count and not barrier.num_bytes for barrier in machine.barriers)
    # Each block of keys and of values of each head exactly once, in two halves, and of no other row.
    cells = [
        (int(page) * KV_HEADS + head) * PAGE
        for row in rows
        for page in tables[row, : num_pages[row]]
        for head in range(KV_HEADS)
    ]
    expected = {(cell, panel) for cell in cells for panel in (0, PANEL)}
    for tensor in (key_cells, value_cells):
        found = {place: count for (pointer, place), count in loads.items() if pointer == tensor.data_ptr()}
        assert found == dict.fromkeys(expected, 1)
    # The product.
    if problem.has_product:
        torch.testing.assert_close(out.float(), x.float() @ weight.float().T, rtol=2e-2, atol=2e-1)
    else:
        assert out.isnan().all()
    # Attention, after what programs share is merged.
    if len(rows):
        merge_program[(num_parts,)](
            attended[rows.start :], parts, log_sums, key_blocks, rows.start, len(rows), GROUP, KV_HEADS, HEAD_DIM, 8, 4
        )
    for row, context in enumerate(contexts.tolist()):
        if row not in rows or not context:
            assert attended[row].isnan().all()
            continue
        pages = tables[row, : num_pages[row]].long()
        there = [cells[pages].transpose(0, 1).reshape(KV_HEADS, context, HEAD_DIM).float() for cells in (keys, values)]
        queries = q[row].view(KV_HEADS, GROUP, HEAD_DIM).float()
        weights = (queries @ there[0].transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
        wanted = (weights @ there[1]).view(-1, HEAD_DIM)
        torch.testing.assert_close(attended[row].float(), wanted, rtol=2e-2, atol=2e-2)


class OnCpu:
    """In place of the compiled kernel: all programs of a launch, one after the other."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*values: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4
            bound = inspect.signature(programs.fused_program.fn).bind(*values, **constants).arguments
            arguments = {name: stand_in(value) for name, value in bound.items()}
            # Launches share the room for parts, and need nothing of what is there.
            for name in ("parts", "log_sums"):
                arguments[name].memory.fill_(torch.nan)
            for program in range(grid[0]):
                Machine(program, grid[0]).run(**arguments)

        return launch


def stand_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    return (value.base, value.block_shape) if hasattr(value, "block_shape") else value


def test_what_is_launched_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = {(4,): lambda *values, num_warps, **constants: merge_program[(4,)](*values, **constants)}
    monkeypatch.setattr(fused_attention, "fused_program", OnCpu())
    monkeypatch.setattr(fused_attention, "merge_program", merge)
    torch.manual_seed(0)
    cut, device = Cut(block_n=128, num_stages=4), torch.device("cpu")
    products = [fused_attention.make_product("p", 128, 256, 64 * 4 * rounds, device) for rounds in (1, 2)]
    attention = fused_attention.make_attention([128, 64, 192], device)
    parts = fused_attention.make_parts(2, device)
    shares = row_shares(3, (1, 2))
    fused_attention.fused_work(products, attention, shares, parts, cut, 2, True, True)()
    assert all(fused_attention.product_error(product) < 0.01 for product in products)
    assert fused_attention.attention_error(attention, range(3)) < 0.01


def test_rows_are_shared_in_proportion_and_none_is_left() -> None:
    assert [len(rows) for rows in row_shares(340, (128, 64, 448, 224))] == [50, 26, 176, 88]
    shares = row_shares(7, (1, 1, 1))
    assert [row for rows in shares for row in rows] == list(range(7))


def test_cuts_fit_into_shared_memory() -> None:
    assert Cut().shared_memory_bytes <= 227 << 10
    with pytest.raises(ValueError, match="shared memory"):
        Cut(num_stages=4)
    with pytest.raises(ValueError, match="steps"):
        Cut(steps=1)
