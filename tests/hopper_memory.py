"""The simulated parts of a Hopper card: registers, shared memory, barriers, and running products.

`hopper.py` runs programs on these. Barriers count arrivals, bytes and phases as on Hopper. A product is computed when
it is waited for, not when it is issued, and fails if its inputs have changed since.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIMEOUT_S = 20.0


class Stuck(Exception):
    """A partition waited for something that never came."""


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

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.unbind(-1)


class Barrier:
    """A word of shared memory that counts the arrivals and bytes of its phase."""

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


def unloaded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What memory holds before it is written: infinity, in FP8 NaN, or the largest of whole numbers."""
    if dtype.is_floating_point:
        return torch.full(shape, torch.nan if dtype.itemsize == 1 else torch.inf).to(dtype)
    return torch.full(shape, torch.iinfo(dtype).max, dtype=dtype)


@dataclass(frozen=True)
class Shared:
    """Memory of a program, or a part of it; infinite before it is written."""

    cells: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.cells.dtype

    def index(self, place: int) -> Shared:
        assert 0 <= place < len(self.cells)
        return Shared(self.cells[place])

    @property
    def shape(self) -> torch.Size:
        return self.cells.shape

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.cells.narrow(dim, start, length))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], _: object) -> Shared:
        return Shared(self.cells.view(dtype).view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.cells.permute(*order))

    def load(self, _: object) -> Tensor:
        return self.cells.clone().as_subclass(Values)

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        self.cells.copy_(value)


@dataclass(frozen=True)
class Barriers:
    """An array of barriers in shared memory."""

    items: tuple[Barrier, ...]

    def index(self, place: int) -> Barrier:
        return self.items[place]


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor in memory at these offsets; a launch writes each at most once."""

    memory: Tensor
    is_written: Tensor
    offset: Any = 0

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.is_written, self.offset + other)

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)


class Pending:
    """A running product."""

    def __init__(self, left: Shared, right: Shared, acc: Any, has_acc: bool) -> None:
        self.left, self.right, self.acc, self.has_acc = left, right, acc, has_acc
        self.factors = (left.cells.clone(), right.cells.clone())
        self.value: Tensor | None = None

    def finish(self) -> None:
        for before, now in zip(self.factors, (self.left.cells, self.right.cells), strict=True):
            is_missing = before.float().isnan() if before.element_size() == 1 else before.isinf()
            assert not is_missing.any(), "a factor was never loaded"
            bits = torch.uint8 if before.element_size() == 1 else torch.int16
            assert torch.equal(before.view(bits), now.view(bits)), "a factor was overwritten"
        acc: Any = self.acc.value if isinstance(self.acc, Pending) else self.acc
        product = self.factors[0].float() @ self.factors[1].float()
        self.value = acc + product if self.has_acc else product
