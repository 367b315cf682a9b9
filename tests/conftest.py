"""Triton chooses between compiling and interpreting while it is imported, so the choice is made before any test is."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
