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


def _repair_rounding_to_8_bits() -> None:
    """Triton 3.6 rounds float32 to e4m3 wrongly where rounding up reaches the next power of two; a GPU does not."""
    convert, float32, e4m3 = interpreter._convert_float, interpreter.tl.float32, interpreter.tl.float8e4nv

    def convert_and_repair(numbers: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if (from_dtype, to_dtype) != (float32, e4m3):
            return convert(numbers, from_dtype, to_dtype, rounding_mode)
        return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert_and_repair


_repair_rounding_to_8_bits()


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
