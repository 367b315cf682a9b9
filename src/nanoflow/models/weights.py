"""Fill a graph's parameters, from safetensors files or at random. The only file of `models/` that knows torch.

Names and shapes of a whole checkpoint are checked from the files' headers before any memory is allocated. Then each
tensor is copied from the mapped file straight into its slice of its fused parameter, so the peak is the model plus at
most one tensor (pages of the mapped file come on top, but the system may take those back).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanoflow.graph.graph import OpGraph, Parameter
from nanoflow.models.config import ModelError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATING = ("F32", "F16", "BF16", "F64")
_NUM_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Parameters of a model, keyed by `Parameter.name`.

    Attributes:
        shared: Those outside the layers.
        layers: Those of each layer.
    """

    shared: dict[str, Tensor]
    layers: tuple[dict[str, Tensor], ...]

    @property
    def num_bytes(self) -> int:
        """Memory that the parameters take."""
        return sum(tensor.nbytes for group in (self.shared, *self.layers) for tensor in group.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor of the checkpoint, as its file's header says."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def load_weights(
    graph: OpGraph, folder: Path, dtype: torch.dtype, device: torch.device, *, show_progress: bool
) -> Weights:
    """Read a checkpoint: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Args:
        graph: The model.
        folder: Where the files are.
        dtype: Type to convert to, while copying.
        device: Where the parameters shall be.
        show_progress: Draw a bar over the tensors.

    Raises:
        ModelError: A file is missing or corrupt, or tensors are missing, superfluous or of another shape or type.
    """
    stored = _read_headers(_checkpoint_files(folder))
    expected = dict(_expected_shapes(graph))
    _check(graph, folder, stored, expected)
    weights = _allocate(graph, dtype, device)
    targets = dict(_targets(graph, weights))
    with tqdm(total=len(targets), desc="Loading weights", unit="tensor", disable=not show_progress) as progress:
        for path in dict.fromkeys(tensor.path for tensor in stored.values()):
            names = [name for name, tensor in stored.items() if tensor.path == path and name in targets]
            _copy_file(path, names, targets, progress)
    return weights


def random_weights(graph: OpGraph, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
    """Draw weights that keep activations finite: matrices normal with deviation 0.02, biases 0.002, norms 1.

    Args:
        graph: The model.
        dtype: Type of the parameters.
        device: Where they shall be; its generator draws, so the same seed gives other numbers on another device.
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
        return {parameter.name: torch.empty(parameter.shape, dtype=dtype, device=device) for parameter in parameters}

    layers = tuple(group(graph.layer_parameters) for _ in range(graph.num_layers))
    return Weights(shared=group(graph.parameters), layers=layers)


def _expected_shapes(graph: OpGraph) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every checkpoint tensor that the graph needs."""
    for parameter in graph.parameters:
        yield from ((part.source, part.shape) for part in parameter.parts)
    for layer in range(graph.num_layers):
        for parameter in graph.layer_parameters:
            yield from ((part.source.format(layer=layer), part.shape) for part in parameter.parts)


def _targets(graph: OpGraph, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Name of every checkpoint tensor and the slice of the fused parameter that it fills."""
    for parameter in graph.parameters:
        yield from _slices(parameter, weights.shared[parameter.name])
    for layer, group in enumerate(weights.layers):
        for parameter in graph.layer_parameters:
            slices = _slices(parameter, group[parameter.name])
            yield from ((source.format(layer=layer), target) for source, target in slices)


def _slices(parameter: Parameter, fused: Tensor) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for part in parameter.parts:
        yield part.source, fused.narrow(0, start, part.shape[0])
        start += part.shape[0]


def _checkpoint_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise ModelError(_nothing_to_read(folder))
    names = _index_files(folder / _INDEX)
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{folder / _INDEX} names {name!r}, which is not there; download it again")
    return [folder / name for name in names]


def _index_files(path: Path) -> list[str]:
    """Files that an index names, each once."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not an index of safetensors files ({type(error).__name__}: {error})") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map must map names of tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A checkpoint may not reach for files outside its folder.
        if Path(name).name != name:
            raise ModelError(f"{path} names {name!r}, which is no file name")
    return names


def _nothing_to_read(folder: Path) -> str:
    """Why a folder without a safetensors checkpoint cannot be read."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has {pickles[0]!r}, but only safetensors is read: convert with transformers' "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{folder} has neither {_SINGLE} nor {_INDEX}: no weights to load"


def _read_headers(paths: list[Path]) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    header = file.get_slice(name)
                    stored[name] = _Stored(path=path, shape=tuple(header.get_shape()), dtype=header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise _corrupt(path, error) from None
    return stored


def _corrupt(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is cut short or no safetensors file; download it again ({error})")


def _check(
    graph: OpGraph, folder: Path, stored: Mapping[str, _Stored], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what the checkpoint has with what the graph needs."""
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelError(f"{folder} lacks {_listed(missing)} that {graph.name} needs")
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in graph.ignored_sources))
    superfluous = [name for name in stored if name not in expected and not ignored.fullmatch(name)]
    if superfluous:
        raise ModelError(f"{folder} has {_listed(superfluous)} that {graph.name} has no place for")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ModelError(f"{stored[name].path}: {name} has shape {stored[name].shape}, expected {shape}")
        if stored[name].dtype not in _FLOATING:
            raise ModelError(
                f"{stored[name].path}: {name} has type {stored[name].dtype}, expected {_one_of(_FLOATING)}"
            )


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _listed(names: list[str]) -> str:
    """The first few names and how many there are."""
    shown = ", ".join(names[:_NUM_NAMED])
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def _copy_file(path: Path, names: list[str], targets: Mapping[str, Tensor], progress: tqdm[None]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                targets[name].copy_(file.get_tensor(name))
                progress.update()
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, error) from None
