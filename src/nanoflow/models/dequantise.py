"""Reads rows of a stored part of a parameter as numbers, a few at a time, whatever the form it is stored in.

The slow twin of kernels that would multiply with the stored numbers directly. Formulas are those of the formats'
definitions, in float32. `stored.py` says which tensors there are; `weights.py` says where the rows go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nanoflow.graph.layers import MXFP4_GROUP
from nanoflow.models.fields import ModelError
from nanoflow.models.ggml import rows_of_blocks
from nanoflow.models.stored import Awq, Blocks, Form, Gptq, Mxfp4, Packed, Plain, Scaled, Stacked, Stored

# Numbers that are in memory as float32 at once, and a multiple of all words and blocks of rows.
_CHUNK_NUMBERS = 2**20
_ROWS_MULTIPLE = 128
# Position of each of eight columns within a word of AWQ.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# compressed-tensors writes this for every column if columns are in order.
_NO_GROUP = -1
# The sixteen numbers of MXFP4 (E2M1: sign, two bits of exponent, one of mantissa), the powers of two of its scales
# (E8M0), and the scale that is no number.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0 = tuple(2.0 ** (exponent - 127) for exponent in range(255))
_NO_SCALE = 255

Tensors = Mapping[str, Tensor]


def read_rows(part: Stored, tensors: Tensors) -> Iterator[tuple[int, Tensor]]:
    """Rows of a part in order, in chunks of bounded size. Of a stack of matrices these are the rows of all of them.

    Args:
        part: The part.
        tensors: Its tensors as they are stored, which may be mapped from a file; of a stack, all or some matrices.

    Yields:
        The number of the first row, and the rows: float32, the stored type if that is plain, or bfloat16 where
        numbers are exact in it.

    Raises:
        ModelError: A tensor has numbers that the form does not allow.
    """
    if isinstance(part.form, Plain):
        yield 0, tensors["weight"]
        return
    if isinstance(part.form, Stacked):
        yield from _stacked(part.form, tensors["weight"])
        return
    _check_groups(part, tensors)
    check_scales(part, tensors)
    read = _READERS[type(part.form)]
    num_rows, width = part.shape[0], part.shape[1] if len(part.shape) > 1 else 1
    if isinstance(part.form, Mxfp4):
        num_rows, width = len(tensors["scales"]) * part.shape[1], part.shape[2]
    step = max(_CHUNK_NUMBERS // width // _ROWS_MULTIPLE, 1) * _ROWS_MULTIPLE
    for first in range(0, num_rows, step):
        yield first, read(part.form, tensors, part.shape, first, min(first + step, num_rows))


def check_scales(part: Stored, tensors: Tensors) -> None:
    """Raise ModelError for a scale that is no number: every product with it would be none."""
    for role in ("weight_scale", "scales"):
        if role in tensors and tensors[role].is_floating_point() and not bool(tensors[role].isfinite().all()):
            where = f"{part.tensors[role].path}: {part.names[role]}"
            raise ModelError(f"{where} has scales that are infinite or no numbers; download it again")


def _check_groups(part: Stored, tensors: Tensors) -> None:
    """Refuse a column whose group is not there."""
    for role, scale in (("g_idx", "scales"), ("weight_g_idx", "weight_scale")):
        if role in tensors:
            groups = tensors[role]
            if role == "weight_g_idx" and bool((groups == _NO_GROUP).all()):
                continue
            # A scale of a whole tensor may have no dimension for groups.
            num_groups = 1
            if tensors[scale].dim() == 2:
                num_groups = tensors[scale].shape[0 if role == "g_idx" else 1]
            if bool(((groups < 0) | (groups >= num_groups)).any()):
                where = f"{part.tensors[role].path}: {part.names[role]}"
                raise ModelError(f"{where} names groups that are not there, of {num_groups}; download it again")
    if isinstance(part.form, Mxfp4) and bool((tensors["scales"] == _NO_SCALE).any()):
        where = f"{part.tensors['scales'].path}: {part.names['scales']}"
        raise ModelError(f"{where} has a scale of {_NO_SCALE}, which is no number; download it again")


def _stacked(form: Stacked, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of each matrix of a stack, or the elements of its bias, in the stored type."""
    for number, matrix in enumerate(weight):
        rows = matrix.T if form.is_transposed else matrix
        if form.is_interleaved:
            rows = rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        yield number * len(rows), rows


def _mxfp4(form: Mxfp4, tensors: Tensors, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    """Of all rows of the stack, those from `first` to `last`; one byte gives two numbers."""
    places = torch.arange(first, last)
    if form.is_interleaved:
        half = shape[1] // 2
        within = places % shape[1]
        places = places - within + 2 * (within % half) + within // half
    blocks, scales = (tensors[role].flatten(0, 1)[places].int() for role in ("blocks", "scales"))
    # A look-up of one word of two numbers is several times as fast as one of each number.
    numbers = _pairs_of_bytes().index_select(0, blocks.flatten()).view(torch.bfloat16).view(*scales.shape, MXFP4_GROUP)
    powers = torch.tensor(_E8M0, dtype=torch.bfloat16)
    return numbers.mul_(powers[scales][..., None]).flatten(1)[:, : shape[2]]


@functools.cache
def _pairs_of_bytes() -> Tensor:
    """int32 [256]: of each byte its two numbers in bfloat16, the first in the lower half."""
    pairs = [(_E2M1[byte % 16], _E2M1[byte // 16]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.bfloat16).view(torch.int32).flatten()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [a, b, 32 / bits]: the numbers in int32 words [a, b], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return torch.bitwise_and(words[..., None] >> shifts, 2**bits - 1)


def _scaled(form: Scaled, tensors: Tensors, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    rows = tensors["weight"][first:last].float()
    scales = tensors["weight_scale"].float()
    if form.block is not None:
        height, width = form.block
        of_blocks = scales.reshape(scales.shape[0], -1)
        # Chunks of rows need not begin with a block.
        of_rows = of_blocks[torch.arange(first, last) // height]
        return rows * of_rows[:, torch.arange(shape[1]) // width]
    if form.has_zeros:
        rows = rows - _of_rows(tensors["weight_zero_point"].float(), first, last)
    return rows * _of_rows(scales, first, last)


def _of_rows(scales: Tensor, first: int, last: int) -> Tensor:
    """[rows, 1], or [1, 1] if there is one for all."""
    return scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(-1, 1)[first:last]


def _awq(form: Awq, tensors: Tensors, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    def numbers(words: Tensor) -> Tensor:
        found = _unpacked(words[:, first // 8 : last // 8], 4)[..., list(_AWQ_PLACES)]
        return found.reshape(len(words), -1)

    groups = torch.arange(shape[1]) // form.group_size
    zeros, scales = numbers(tensors["qzeros"]), tensors["scales"][:, first:last].float()
    return ((numbers(tensors["qweight"]) - zeros[groups]) * scales[groups]).T


def _gptq(form: Gptq, tensors: Tensors, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    per_word, most = 32 // form.bits, 2**form.bits - 1
    numbers = _unpacked(tensors["qweight"][:, first:last], form.bits).transpose(1, 2).reshape(shape[1], -1)
    stored_zeros = _unpacked(tensors["qzeros"][:, first // per_word : last // per_word], form.bits)
    # Version 1 stores a zero point of 0 as -1.
    zeros = torch.bitwise_and(stored_zeros.flatten(1) + form.zero_offset, most)
    groups = tensors["g_idx"].long() if "g_idx" in tensors else torch.arange(shape[1]) // form.group_size
    return ((numbers - zeros[groups]) * tensors["scales"][:, first:last].float()[groups]).T


def _packed(form: Packed, tensors: Tensors, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    per_word = 32 // form.bits
    numbers = _unpacked(tensors["weight_packed"][first:last], form.bits).flatten(1)[:, : shape[1]]
    scales = tensors["weight_scale"].float()
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales[first:last]
    zeros = torch.full((1, 1), 2 ** (form.bits - 1), dtype=torch.int32)
    if form.has_zeros:
        words = tensors["weight_zero_point"][first // per_word : -(-last // per_word)]
        zeros = _unpacked(words, form.bits).transpose(1, 2).flatten(0, 1)[: last - first]
    if form.group_size is None:
        return (numbers - zeros) * scales
    held = tensors.get("weight_g_idx")
    has_groups = held is not None and not bool((held == _NO_GROUP).all())
    groups = held.long() if held is not None and has_groups else torch.arange(shape[1]) // form.group_size
    return (numbers - (zeros[:, groups] if form.has_zeros else zeros)) * scales[:, groups]


def _blocks(form: Blocks, tensors: Tensors, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    """Rows of a tensor of a GGUF file, whose bytes are `tensors["weight"]` [rows, bytes]."""
    places = torch.arange(first, last)
    if form.num_rotated_heads is not None:
        # Row 2 i + j of a stored head is row i + j * half of the head.
        size = shape[0] // form.num_rotated_heads
        within, half = places % size, size // 2
        places = places - within + 2 * (within % half) + within // half
    numbers = rows_of_blocks(tensors["weight"][places], form.dtype)
    return (numbers + form.shift if form.shift else numbers).reshape(last - first, *shape[1:])


_Reader = Callable[[Any, Tensors, tuple[int, ...], int, int], Tensor]
_READERS: dict[type[Form], _Reader] = {
    Scaled: _scaled,
    Awq: _awq,
    Gptq: _gptq,
    Packed: _packed,
    Blocks: _blocks,
    Mxfp4: _mxfp4,
}
