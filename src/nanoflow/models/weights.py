"""Loads a graph's parameters from safetensors or GGUF files, or draws them at random.

Names and shapes of the whole checkpoint are checked from the files' headers before memory is allocated
(`contents.py`). Then each part is copied from the memory-mapped file into its slice of its parameter (`placing.py`), to
a GPU by several threads at once; quantised ones become numbers on the way, a few rows at a time. Pages that
were read count as the process's memory while the file is mapped. So a file is mapped again after every `_MAPPED_BYTES`,
larger tensors of plain numbers are copied in pieces of some rows, and peak memory is the model plus, for each thread,
that much, the largest row (of stacked experts: one expert) or the largest quantised tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanoflow.graph.graph import OpGraph, Parameter
from nanoflow.graph.operation import OpKind
from nanoflow.models.checkpoint import corrupt
from nanoflow.models.contents import Contents, read_contents
from nanoflow.models.fp8 import quantised_chunks
from nanoflow.models.mxfp4 import draw_mxfp4, lay_out
from nanoflow.models.placing import Copy, Target, allocate, groups_of, targets_of
from nanoflow.models.placing import Weights as Weights
from nanoflow.models.stored import Blocks, Mxfp4, Plain, Stacked, Stored

_MAPPED_BYTES = 64 * 2**20
_MAX_THREADS = 8


class Copier(Protocol):
    """Copies tensors from a mapped file to a GPU; each is used by one thread. `device/transfer.py` has one."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy, with conversion; `source` may be freed afterwards."""

    def wait(self) -> None:
        """Wait until all is on the device."""


def load_weights(
    graph: OpGraph,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    show_progress: bool,
    make_copier: Callable[[torch.device], Copier] | None = None,
) -> Weights:
    """Read a checkpoint: `model.safetensors`, or the shards that `model.safetensors.index.json` names, or a GGUF file.

    Args:
        graph: The model.
        folder: Folder of the files, or the GGUF file.
        dtype: Type to convert to while copying; parameters in FP8 are quantised instead, unless they are stored so.
        device: Device of the parameters.
        show_progress: Show a progress bar.
        make_copier: Makes what copies to a GPU in each of several threads; without it, one thread copies.

    Raises:
        ModelError: A file is missing or corrupt, or tensors are missing, unknown, or of another shape or type.
    """
    contents = check_weights(graph, folder)
    weights = allocate(graph, dtype, device)
    targets = dict(targets_of(graph, weights, contents))
    mappings = list(_mappings(contents.parts))
    total = sum(map(len, mappings))
    with tqdm(total=total, desc="Loading weights", unit="tensor", disable=not show_progress) as progress:
        if make_copier is None:
            for mapping in mappings:
                _copy_mapping(mapping, targets, Tensor.copy_, progress.update)
        else:
            _copy_by_threads(mappings, targets, partial(make_copier, device), progress)
    _add_offsets(graph, weights)
    _lay_out(graph, weights)
    return weights


def check_weights(graph: OpGraph, folder: Path) -> Contents:
    """Compare names, shapes and types of a checkpoint's tensors with what a graph needs; nothing is loaded.

    Raises:
        ModelError: As `load_weights`.
    """
    return read_contents(graph, folder)


def random_weights(graph: OpGraph, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
    """Draw weights that keep activations finite: normal with deviation 0.02 (matrices) and 0.002 (biases), norms 1.

    In a mixture of experts the embedding has deviation 1, so that tokens choose experts about evenly: attention adds
    what tokens have in common, and beside a small embedding most of them would choose the same experts.

    Args:
        graph: The model.
        dtype: Type of the parameters.
        device: Device of the parameters. Its generator draws them, so one seed gives different numbers on different
            devices.
        seed: Seed of the generator.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = allocate(graph, dtype, device)
    has_experts = any(op.kind is OpKind.ROUTER for op in graph.layer_operations)
    embeddings = {name for op in graph.prologue for name in op.weights} if has_experts else set()
    for parameters, group in groups_of(graph, weights):
        for parameter in parameters:
            deviation = 0.002 if parameter.name.endswith(".bias") else 1.0 if parameter.name in embeddings else 0.02
            _draw(parameter, group, dtype, deviation, generator)
    if device.type == "cuda" and graph.num_fp8_parameters:
        # What they were drawn into is free, but the driver counts it as used until it is returned.
        torch.cuda.empty_cache()
    return weights


def _draw(
    parameter: Parameter, group: dict[str, Tensor], dtype: torch.dtype, deviation: float, generator: torch.Generator
) -> None:
    """Fill a parameter; one in FP8 gets the numbers that it would have without, quantised; one in MXFP4 random bits.

    Of a stack each matrix is drawn by itself, since experts take memory for no second copy of all of them.
    """
    name, tensor = parameter.name, group[parameter.name]
    if parameter.packed is not None:
        draw_mxfp4(tensor, group[parameter.scales_name], generator)
        return
    if tensor.dim() == 1 and not name.endswith(".bias"):
        tensor.fill_(1.0)
        return
    is_stack = parameter.num_stacked is not None
    of_rows = None if parameter.fp8 is None else group[parameter.scales_name]
    for place in range(parameter.num_stacked or 1):
        matrix = tensor[place] if is_stack else tensor
        drawn = matrix if of_rows is None else torch.empty(matrix.shape, dtype=dtype, device=tensor.device)
        drawn.normal_(0.0, deviation, generator=generator)
        if of_rows is not None:
            own = of_rows[place] if is_stack else of_rows
            for first, numbers, scales in quantised_chunks(drawn):
                matrix[first : first + len(numbers)] = numbers
                own[first : first + len(numbers)] = scales


def _add_offsets(graph: OpGraph, weights: Weights) -> None:
    for parameters, tensors in groups_of(graph, weights):
        for parameter in parameters:
            if parameter.offset:
                tensors[parameter.name].add_(parameter.offset)


def _lay_out(graph: OpGraph, weights: Weights) -> None:
    """Bring what is kept in MXFP4 into the order of kernels."""
    for parameters, tensors in groups_of(graph, weights):
        for parameter in parameters:
            if parameter.packed is not None:
                words, scales = tensors[parameter.name], tensors[parameter.scales_name]
                lay_out(words, scales, is_gated=parameter.packed.is_gated)
                if words.is_cuda:
                    # As after drawing: the driver counts what was needed in between as used.
                    torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Rows of a part that is stored as plain numbers, or matrices of a stack; None for all of a part in any form."""

    part: Stored
    rows: slice | None = None


_Mapping = list[_Piece]


def _mappings(parts: Mapping[str, Stored]) -> Iterator[_Mapping]:
    """The parts, in the order of their files, in groups that may be mapped at once."""
    for path in dict.fromkeys(part.main.path for part in parts.values()):
        yield from _groups([part for part in parts.values() if part.main.path == path])


def _groups(parts: list[Stored]) -> Iterator[_Mapping]:
    """Pieces of the parts of one file in order of their position in it."""
    group: _Mapping = []
    num_bytes = 0
    for part in sorted(parts, key=lambda part: part.main.start):
        if group and num_bytes + part.num_bytes > _MAPPED_BYTES:
            yield group
            group, num_bytes = [], 0
        *before, last = _pieces(part)
        yield from ([piece] for piece in before)
        group.append(last)
        num_bytes += part.num_bytes
    if group:
        yield group


def _pieces(part: Stored) -> _Mapping:
    """A part as a whole, or the fewest pieces that are small enough to be mapped."""
    num_rows = part.shape[0] if part.shape else 1
    if part.num_bytes <= _MAPPED_BYTES or num_rows == 1 or not isinstance(part.form, Plain | Stacked | Mxfp4):
        return [_Piece(part=part)]
    step = max(num_rows * _MAPPED_BYTES // part.num_bytes, 1)
    return [_Piece(part=part, rows=slice(start, start + step)) for start in range(0, num_rows, step)]


def _copy_by_threads(
    mappings: list[_Mapping], targets: Mapping[str, Target], make_copier: Callable[[], Copier], progress: tqdm[None]
) -> None:
    """Copy by several threads; the first error of one is raised."""
    copiers: list[Copier] = []
    of_thread = threading.local()

    def start() -> None:
        of_thread.copier = make_copier()
        copiers.append(of_thread.copier)

    def copy(mapping: _Mapping) -> int:
        _copy_mapping(mapping, targets, of_thread.copier.copy)
        return len(mapping)

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, "nanoflow-weights", initializer=start) as threads:
        for num_copied in threads.map(copy, mappings):
            progress.update(num_copied)
    for copier in copiers:
        copier.wait()


def _copy_mapping(
    mapping: _Mapping,
    targets: Mapping[str, Target],
    copy: Copy,
    note_copied: Callable[[], object] = lambda: None,
) -> None:
    """Copy some parts: `copy(target, source)`; ModelError if a file is corrupt."""
    files: dict[Path, Any] = {}
    with ExitStack() as opened:
        for piece in mapping:
            part, target = piece.part, targets[piece.part.name]
            tensors = _mapped(piece, files, opened)
            if isinstance(part.form, Stacked | Mxfp4):
                target.matrices(piece.rows).put_part(part, tensors, copy)
            elif piece.rows is None:
                target.put_part(part, tensors, copy)
            else:
                target.put(piece.rows.start, tensors["weight"], copy)
            note_copied()


def _mapped(piece: _Piece, files: dict[Path, Any], opened: ExitStack) -> dict[str, Tensor]:
    """The tensors of a piece, mapped from its files, which stay open; of a GGUF file the bytes of rows."""
    found: dict[str, Tensor] = {}
    part = piece.part
    for role, tensor in part.tensors.items():
        try:
            if isinstance(part.form, Blocks):
                shape = (tensor.shape[0], (tensor.end - tensor.start) // tensor.shape[0])
                # Copy on write, since torch wants memory that can be written.
                found[role] = torch.from_numpy(np.memmap(tensor.path, np.uint8, "c", tensor.start, shape))
                continue
            if tensor.path not in files:
                files[tensor.path] = opened.enter_context(safe_open(tensor.path, framework="pt"))
            file, name = files[tensor.path], part.names[role]
            found[role] = file.get_tensor(name) if piece.rows is None else file.get_slice(name)[piece.rows]
        except (SafetensorError, OSError, ValueError) as error:
            raise corrupt(tensor.path, error) from None
    return found
