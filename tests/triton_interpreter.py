"""Triton's interpreter for tests on a machine without a GPU; import this before anything that imports Triton."""

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
    """Triton 3.6 makes a loop bound of an array of one number, which NumPy 2.4 no longer takes for a number."""
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_repair


_repair_loop_bounds()


def _patch_once() -> None:
    """The language is patched once a launch, not again for each function that a program calls: most of the time."""
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
