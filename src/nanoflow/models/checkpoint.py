"""Lists the tensors of a checkpoint from the headers of its safetensors files, without torch and without reading any.

Files are not trusted: the size of a header is checked before it is read, and its contents must fit the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nanoflow.models.fields import (
    MAX_INDEX_BYTES,
    ModelError,
    is_there,
    read_object,
    require_file,
    shown,
    without_duplicates,
)
from nanoflow.models.formats import other_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Enough for some hundred thousand tensors.
_MAX_HEADER_BYTES = 32 * 2**20
_LENGTH_BYTES = 8
_COMPARED_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint, as described by its file's header.

    Attributes:
        path: The file.
        shape, dtype: As in the header, e.g. (131, 64) and "BF16".
        start, end: Byte range in the file.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        ModelError: A file is missing, not a regular file, corrupt, or outside the folder, or a tensor is in two files.
    """
    stored: dict[str, StoredTensor] = {}
    paths, indexed = _files(folder)
    for path in paths:
        for name, tensor in _read_header(path).items():
            if name in stored:
                raise ModelError(f"{printable(name)} is in both {stored[name].path} and {path}: remove one of them")
            stored[name] = tensor
    lost = [name for name in indexed if name not in stored]
    if lost:
        raise ModelError(f"{folder / INDEX} names {printable(lost[0])} in {shown(indexed[lost[0]])}, which lacks it")
    return stored


def peek(folder: Path) -> dict[str, StoredTensor]:
    """As `read_checkpoint`, but empty if there is no readable checkpoint: loading it reports the error later."""
    try:
        return read_checkpoint(folder)
    except ModelError:
        return {}


def differ(one: StoredTensor | None, other: StoredTensor | None) -> bool:
    """True if both tensors exist and differ in their values or dtype."""
    return one is not None and other is not None and not _are_same(one, other)


def corrupt(path: Path, error: object) -> ModelError:
    """The error for a corrupt file."""
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"{path} is cut short or no safetensors file; download it again ({reason})")


def printable(name: str) -> str:
    """The name of a tensor for a message: unchanged, or quoted and shortened if it is unusual."""
    return name if name.isprintable() and len(name) <= 120 else shown(name)


def _files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files to read, and the file of each tensor by the index (empty without one)."""
    for name in (SINGLE, INDEX):
        if is_there(folder / name):
            require_file(folder / name)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if not (folder / INDEX).is_file():
        raise ModelError(_nothing_to_read(folder))
    indexed = _read_index(folder / INDEX)
    paths = [folder / name for name in sorted(set(indexed.values()))]
    for path in paths:
        if not is_there(path):
            raise ModelError(f"{folder / INDEX} names {shown(path.name)}, which is not there; download it again")
        require_file(path)
    return paths, indexed


def _read_index(path: Path) -> Mapping[str, str]:
    """The file of each tensor, from an index."""
    weight_map = read_object(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map must map names of tensors to files")
    for name in weight_map.values():
        # A checkpoint must not refer to files outside its folder.
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ModelError(f"{path} names {shown(name)}, which is no file name")
    return weight_map


def _nothing_to_read(folder: Path) -> str:
    """Error for a folder without a safetensors checkpoint."""
    others = other_weights(folder)
    if others is not None:
        return f"{folder} {others}"
    return f"{folder} has neither {SINGLE} nor {INDEX}: no weights to load"


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = require_file(path)
    try:
        header, start = _header_of(path, size)
        # The library checks the header against the file: lengths, order and total size of all tensors.
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
        return {name: _stored(path, header[name], start) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise corrupt(path, error) from None


def _header_of(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header of a file of `size` bytes, and the offset at which tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ValueError(f"its header has {length} bytes, the file {size}")
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, _LENGTH_BYTES + length


def _stored(path: Path, entry: Mapping[str, Any], start: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    return StoredTensor(
        path=path, shape=tuple(entry["shape"]), dtype=str(entry["dtype"]), start=start + first, end=start + last
    )


def _are_same(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype, one.end - one.start) != (other.shape, other.dtype, other.end - other.start):
        return False
    return all(first == second for first, second in zip(_chunks(one), _chunks(other), strict=True))


def _chunks(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        for begin in range(tensor.start, tensor.end, _COMPARED_BYTES):
            yield file.read(min(_COMPARED_BYTES, tensor.end - begin))
