"""Triton's interpreter for tests without a GPU; must be imported before anything that imports Triton."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the compiled kernels", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"
interpreter = pytest.importorskip("triton.runtime.interpreter")


def _repair_loop_bounds() -> None:
    """Triton 3.6 uses an array with one number as a loop bound, which NumPy 2.4 no longer accepts as a number."""
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_repair


_repair_loop_bounds()


def _repair_rounding() -> None:
    """Triton 3.6 truncates to bfloat16, and rounds to e4m3 wrongly up to the next power of two; a GPU does neither."""
    convert, language = interpreter._convert_float, interpreter.tl
    repaired = {
        language.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        language.bfloat16: (torch.bfloat16, torch.uint16),
    }

    def convert_and_repair(numbers: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if from_dtype != language.float32 or to_dtype not in repaired:
            return convert(numbers, from_dtype, to_dtype, rounding_mode)
        dtype, bits = repaired[to_dtype]
        return torch.from_numpy(numbers.view("float32")).to(dtype).view(bits).numpy()

    interpreter._convert_float = convert_and_repair


_repair_rounding()


def _exact(bits: Any) -> Any:
    """float32 of bfloat16 numbers, which the interpreter keeps as uint16."""
    return (bits.astype("uint32") << 16).view("float32")


def _repair_products_of_bfloat16() -> None:
    """Triton 3.6 multiplies the bits of matrices as if they were integers, and has no instructions in assembly."""
    builder = interpreter.InterpreterBuilder
    multiply, bfloat16 = builder.create_dot, interpreter.tl.bfloat16

    def create_dot(self: Any, left: Any, right: Any, addend: Any, *options: Any) -> Any:
        if left.dtype.scalar == bfloat16 and right.dtype.scalar == bfloat16:
            product = _exact(left.data) @ _exact(right.data)
            return interpreter.TensorHandle(product + addend.data, addend.dtype.scalar)
        return multiply(self, left, right, addend, *options)

    def create_inline_asm(_self: Any, assembly: str, _constraints: str, values: Any, *_options: Any) -> Any:
        if not assembly:
            return SimpleNamespace(get_result=lambda _: values[0])
        assert assembly.startswith("mul.rn.bf16x2 "), "the only instruction that tests know"
        # Products of the lower halves, then of the upper ones; these are exact in the kernels that use them.
        halves = [[value.data.astype("uint32") >> shift & 0xFFFF for value in values] for shift in (0, 16)]
        low, high = ((_exact(one) * _exact(other)).view("uint32") for one, other in halves)
        both = (low >> 16 | high & 0xFFFF0000).view("int32")
        return SimpleNamespace(get_result=lambda _: interpreter.TensorHandle(both, interpreter.tl.int32))

    builder.create_dot, builder.create_inline_asm = create_dot, create_inline_asm


_repair_products_of_bfloat16()


def _patch_once() -> None:
    """Patch the language once per launch instead of at each call of a function, which takes most of the time."""
    patch, language = interpreter._patch_lang, interpreter.tl
    everything = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    is_patched = False

    def patch_unless_patched(_function: Any) -> Any:
        nonlocal is_patched
        if is_patched:
            return interpreter._LangPatchScope()
        scope, is_patched = patch(everything), True
        restore = scope.restore

        def restore_all() -> None:
            nonlocal is_patched
            is_patched = False
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_unless_patched


_patch_once()
