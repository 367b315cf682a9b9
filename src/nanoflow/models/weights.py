"""Loads a graph's parameters from safetensors files, or draws them at random. The only file of `models/` with torch.

Names and shapes of the whole checkpoint are checked from the files' headers before memory is allocated. Then each
tensor is copied from the memory-mapped file into its slice of its parameter, to a GPU by several threads at once. Pages
that were read count as the process's memory while the file is mapped. So a file is mapped again after every
`_MAPPED_BYTES`, larger tensors are copied in pieces of some rows, and peak memory is the model plus, for each thread,
that much or the largest row (of stacked experts: one expert).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanoflow.graph.graph import OpGraph, Parameter
from nanoflow.models.checkpoint import StoredTensor, corrupt, printable, read_checkpoint
from nanoflow.models.fields import ModelError, shown

_FLOATING = ("F32", "F16", "BF16", "F64")
_NUM_NAMED = 3
_MAPPED_BYTES = 64 * 2**20
_MAX_THREADS = 8
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\..*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Parameters of a model, by `Parameter.name`.

    Attributes:
        shared: Parameters outside the layers.
        layers: Parameters of each layer.
    """

    shared: dict[str, Tensor]
    layers: tuple[dict[str, Tensor], ...]

    @property
    def num_bytes(self) -> int:
        """Memory of the parameters in bytes."""
        return sum(tensor.nbytes for group in (self.shared, *self.layers) for tensor in group.values())


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
    """Read a checkpoint: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Args:
        graph: The model.
        folder: Folder of the files.
        dtype: Type to convert to while copying.
        device: Device of the parameters.
        show_progress: Show a progress bar.
        make_copier: Makes what copies to a GPU in each of several threads; without it, one thread copies.

    Raises:
        ModelError: A file is missing or corrupt, or tensors are missing, unknown, or of another shape or type.
    """
    stored = check_weights(graph, folder)
    weights = _allocate(graph, dtype, device)
    targets = dict(_targets(graph, weights, stored))
    mappings = list(_mappings(stored, targets))
    total = sum(len(pieces) for _, pieces in mappings)
    with tqdm(total=total, desc="Loading weights", unit="tensor", disable=not show_progress) as progress:
        if make_copier is None:
            for mapping in mappings:
                _copy_mapping(mapping, targets, Tensor.copy_, progress.update)
        else:
            _copy_by_threads(mappings, targets, partial(make_copier, device), progress)
    _add_offsets(graph, weights)
    return weights


def check_weights(graph: OpGraph, folder: Path) -> dict[str, StoredTensor]:
    """Compare names, shapes and types of a checkpoint's tensors with what a graph needs; nothing is loaded.

    Returns:
        Every tensor of the checkpoint.

    Raises:
        ModelError: As `load_weights`.
    """
    stored = read_checkpoint(folder)
    _check(graph, folder, stored, dict(_expected_shapes(graph, stored)))
    return stored


def random_weights(graph: OpGraph, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
    """Draw weights that keep activations finite: normal with deviation 0.02 (matrices) and 0.002 (biases), norms 1.

    Args:
        graph: The model.
        dtype: Type of the parameters.
        device: Device of the parameters. Its generator draws them, so one seed gives different numbers on different
            devices.
        seed: Seed of the generator.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = _allocate(graph, dtype, device)
    for group in (weights.shared, *weights.layers):
        for name, tensor in group.items():
            if tensor.dim() == 1 and not name.endswith(".bias"):
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.002 if name.endswith(".bias") else 0.02, generator=generator)
    return weights


def _allocate(graph: OpGraph, dtype: torch.dtype, device: torch.device) -> Weights:
    def group(parameters: tuple[Parameter, ...]) -> dict[str, Tensor]:
        return {
            each.name: torch.empty(each.shape, dtype=torch.float32 if each.is_float32 else dtype, device=device)
            for each in parameters
        }

    return Weights(shared=group(graph.parameters), layers=tuple(group(kind.parameters) for kind in graph.layers))


def _add_offsets(graph: OpGraph, weights: Weights) -> None:
    groups = (
        (graph.parameters, weights.shared),
        *zip((kind.parameters for kind in graph.layers), weights.layers, strict=True),
    )
    for parameters, tensors in groups:
        for parameter in parameters:
            if parameter.offset:
                tensors[parameter.name].add_(parameter.offset)


def _expected_shapes(graph: OpGraph, stored: Container[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every checkpoint tensor that the graph needs."""
    for parameter in graph.parameters:
        yield from _sources(parameter, stored)
    for layer, kind in enumerate(graph.layers):
        for parameter in kind.parameters:
            yield from _sources(parameter, stored, layer)


def _targets(graph: OpGraph, weights: Weights, stored: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Name of every checkpoint tensor, and the slice of the parameter that it is copied to."""
    for parameter in graph.parameters:
        yield from _slices(parameter, weights.shared[parameter.name], stored)
    for layer, (kind, group) in enumerate(zip(graph.layers, weights.layers, strict=True)):
        for parameter in kind.parameters:
            yield from _slices(parameter, group[parameter.name], stored, layer)


def _sources(
    parameter: Parameter, stored: Container[str], layer: int | None = None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the checkpoint tensors of a parameter: the whole one if it is stored, else its parts."""
    whole = parameter.whole and parameter.whole.format(layer=layer)
    if whole is not None and whole in stored:
        yield whole, parameter.shape
        return
    for part in parameter.parts:
        name, other = (source and source.format(layer=layer) for source in (part.source, part.other_source))
        assert name is not None
        yield other if other is not None and name not in stored and other in stored else name, part.shape


def _slices(
    parameter: Parameter, fused: Tensor, stored: Container[str], layer: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    sources = dict(_sources(parameter, stored, layer))
    # Parts are below each other; only a tensor that is stored whole has a dimension for stacked matrices.
    rows = fused.flatten(0, 1) if fused.dim() > len(next(iter(sources.values()))) else fused
    start = 0
    for name, shape in sources.items():
        yield name, rows.narrow(0, start, shape[0])
        start += shape[0]


def _check(
    graph: OpGraph, folder: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors of the checkpoint with those that the graph needs."""
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelError(f"{folder} lacks {_listed(missing)} that {graph.name} needs{_layers(graph, stored)}")
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in graph.ignored_sources))
    superfluous = [name for name in stored if name not in expected and not ignored.fullmatch(name)]
    if superfluous:
        layers = _layers(graph, stored)
        raise ModelError(f"{folder} has {_listed(superfluous)} that {graph.name} has no place for{layers}")
    for name, shape in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            problem = f"has shape {shown(tensor.shape)}, expected {shape} by config.json"
            raise ModelError(f"{tensor.path}: {name} {problem}")
        if tensor.dtype not in _FLOATING:
            raise ModelError(f"{tensor.path}: {name} has type {tensor.dtype}, expected {_one_of(_FLOATING)}")


def _layers(graph: OpGraph, stored: Iterable[str]) -> str:
    """The expected and actual numbers of layers, if they differ; else empty."""
    found = {int(match[1]) for name in stored if (match := _LAYER.fullmatch(name))}
    num_layers = max(found, default=-1) + 1
    if num_layers == graph.num_layers:
        return ""
    return f": num_hidden_layers is {graph.num_layers} in config.json, the weights have {num_layers}"


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _listed(names: list[str]) -> str:
    """The first few names, and how many there are."""
    first = ", ".join(printable(name) for name in names[:_NUM_NAMED])
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({first}{more})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Rows of a tensor of a file; None for all of it."""

    name: str
    rows: slice | None = None


_Mapping = tuple[Path, list[_Piece]]


def _mappings(stored: Mapping[str, StoredTensor], targets: Container[str]) -> Iterator[_Mapping]:
    """The files of a checkpoint, each as often as it is mapped, and what to copy from it then."""
    for path in dict.fromkeys(tensor.path for tensor in stored.values()):
        here = {name: tensor for name, tensor in stored.items() if tensor.path == path and name in targets}
        yield from ((path, pieces) for pieces in _groups(here))


def _groups(stored: Mapping[str, StoredTensor]) -> Iterator[list[_Piece]]:
    """Pieces of tensors in order of their position in the file, grouped by what may be mapped at once."""
    pieces: list[_Piece] = []
    num_bytes = 0
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].start):
        size = tensor.end - tensor.start
        if pieces and num_bytes + size > _MAPPED_BYTES:
            yield pieces
            pieces, num_bytes = [], 0
        *before, last = _pieces(name, tensor.shape, size)
        yield from ([piece] for piece in before)
        pieces.append(last)
        num_bytes += size
    if pieces:
        yield pieces


def _pieces(name: str, shape: tuple[int, ...], num_bytes: int) -> list[_Piece]:
    """A tensor as a whole, or the fewest pieces that are small enough to be mapped."""
    num_rows = shape[0] if shape else 1
    if num_bytes <= _MAPPED_BYTES or num_rows == 1:
        return [_Piece(name=name)]
    step = max(num_rows * _MAPPED_BYTES // num_bytes, 1)
    return [_Piece(name=name, rows=slice(start, start + step)) for start in range(0, num_rows, step)]


def _copy_by_threads(
    mappings: list[_Mapping], targets: Mapping[str, Tensor], make_copier: Callable[[], Copier], progress: tqdm[None]
) -> None:
    """Copy by several threads; the first error of one is raised."""
    copiers: list[Copier] = []
    of_thread = threading.local()

    def start() -> None:
        of_thread.copier = make_copier()
        copiers.append(of_thread.copier)

    def copy(mapping: _Mapping) -> int:
        _copy_mapping(mapping, targets, of_thread.copier.copy)
        return len(mapping[1])

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, "nanoflow-weights", initializer=start) as threads:
        for num_copied in threads.map(copy, mappings):
            progress.update(num_copied)
    for copier in copiers:
        copier.wait()


def _copy_mapping(
    mapping: _Mapping,
    targets: Mapping[str, Tensor],
    copy: Callable[[Tensor, Tensor], object],
    note_copied: Callable[[], object] = lambda: None,
) -> None:
    """Copy some tensors of a file: `copy(target, source)`; ModelError if the file is corrupt."""
    path, pieces = mapping
    try:
        with safe_open(path, framework="pt") as file:
            for piece in pieces:
                if piece.rows is None:
                    copy(targets[piece.name], file.get_tensor(piece.name))
                else:
                    copy(targets[piece.name][piece.rows], file.get_slice(piece.name)[piece.rows])
                note_copied()
    except (SafetensorError, OSError) as error:
        raise corrupt(path, error) from None
