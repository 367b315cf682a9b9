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
