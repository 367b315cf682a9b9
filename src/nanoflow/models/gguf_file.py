"""Reads the header of a GGUF file, without torch: metadata, and where each tensor is. Versions 2 and 3, little-endian.

Files are not trusted: every length is compared with the file before anything of that length is read. What the metadata
mean is in `gguf_model.py`; `ggml.py` makes numbers of blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from nanoflow.models.checkpoint import StoredTensor, printable
from nanoflow.models.fields import ModelError, require_file, shown

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The same versions in a file whose numbers begin with the highest byte.
_SWAPPED = tuple(version << 24 for version in _VERSIONS)
_MAX_DIMENSIONS = 4
# Metadata of the largest vocabularies have some tens of MB.
_MAX_HEADER_BYTES = 512 * 2**20
_MAX_DEPTH = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """A type of numbers.

    Attributes:
        number: In files.
        num_numbers, num_bytes: Size of a block.
    """

    number: int
    num_numbers: int
    num_bytes: int


TYPES: Mapping[str, BlockType] = {
    "F32": BlockType(number=0, num_numbers=1, num_bytes=4),
    "F16": BlockType(number=1, num_numbers=1, num_bytes=2),
    "BF16": BlockType(number=30, num_numbers=1, num_bytes=2),
    "Q4_0": BlockType(number=2, num_numbers=32, num_bytes=18),
    "Q4_1": BlockType(number=3, num_numbers=32, num_bytes=20),
    "Q5_0": BlockType(number=6, num_numbers=32, num_bytes=22),
    "Q5_1": BlockType(number=7, num_numbers=32, num_bytes=24),
    "Q8_0": BlockType(number=8, num_numbers=32, num_bytes=34),
    "Q4_K": BlockType(number=12, num_numbers=256, num_bytes=144),
    "Q5_K": BlockType(number=13, num_numbers=256, num_bytes=176),
    "Q6_K": BlockType(number=14, num_numbers=256, num_bytes=210),
}
# Types that are not read, by their numbers in files.
_OTHERS = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
_BY_NUMBER = {kind.number: name for name, kind in TYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Values by key, such as "llama.block_count"; arrays are lists.
        tensors: By the names in the file; shapes with rows first.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF files do."""
    try:
        # Opening a pipe could wait forever.
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """The header of a file; read once, unless the file changes.

    Raises:
        ModelError: It is cut short or damaged, of another version, or has tensors of a type that is not read.
    """
    size = require_file(path)
    return _read(path, size, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, size: int, _changed_ns: int) -> GgufFile:
    try:
        with path.open("rb") as file:
            return _header(path, _Reader(file=file, size=size))
    except (OSError, ValueError, struct.error, MemoryError) as error:
        if isinstance(error, ModelError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is cut short or no GGUF file; download it again ({reason})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads values one after the other, and refuses lengths that the file cannot have."""

    file: BinaryIO
    size: int

    def take(self, count: int) -> bytes:
        end = self.file.tell() + count
        if end > min(self.size, _MAX_HEADER_BYTES):
            raise ValueError(f"its header has at least {end} bytes, the file {self.size}")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        # llama.cpp does not check texts; tokens may be parts of characters.
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"type {kind} of metadata is not known")
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if depth >= _MAX_DEPTH or (inner != _STRING and inner != _ARRAY and inner not in _SCALARS):
            raise ValueError(f"arrays of type {inner}, {depth} deep")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))
        if count > self.size:
            raise ValueError(f"an array of {count}")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _header(path: Path, reader: _Reader) -> GgufFile:
    if reader.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version in _SWAPPED:
        raise ModelError(f"{path}: its numbers are big-endian, which is not read: convert the model anew")
    if version not in _VERSIONS:
        raise ModelError(f"{path}: GGUF version {version} is not read, versions 2 and 3 are: convert the model anew")
    num_tensors, num_values = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.text()
        if key in metadata:
            raise ValueError(f"{shown(key)} is twice in its metadata")
        metadata[key] = reader.value(reader.number("I"))
    listed = [_entry(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {shown(alignment)}")
    start = -(-reader.file.tell() // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in listed:
        if name in tensors:
            raise ValueError(f"{printable(name)} is there twice")
        tensors[name] = _tensor(path, name, shape, kind, start + offset)
        if tensors[name].end > reader.size:
            raise ValueError(f"{printable(name)} ends at byte {tensors[name].end}, the file has {reader.size}")
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, num_dimensions = reader.text(), reader.number("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"{printable(name)} has {num_dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(num_dimensions))
    return name, shape[::-1], reader.number("I"), reader.number("Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, start: int) -> StoredTensor:
    if number not in _BY_NUMBER:
        kind = _OTHERS.get(number, f"number {number}")
        raise ModelError(
            f"{path}: {printable(name)} has type {kind}, which is not read; take a file with {', '.join(TYPES)}, "
            "or the model that it was made from, in safetensors"
        )
    dtype = _BY_NUMBER[number]
    block = TYPES[dtype]
    if shape[-1] % block.num_numbers:
        raise ValueError(f"{printable(name)} has rows of {shape[-1]}, {dtype} has blocks of {block.num_numbers}")
    count = 1
    for size in shape:
        count *= size
    num_bytes = count // block.num_numbers * block.num_bytes
    return StoredTensor(path=path, shape=shape, dtype=dtype, start=start, end=start + num_bytes)
