"""How parts of parameters are stored: the tensors that each form needs, with their shapes and types. Data, no torch.

A form belongs to a part of a parameter. Here it is known which tensors of a checkpoint it consists of;
`dequantise.py` knows how its rows are read, and a kernel that works on the stored numbers would be chosen by it.
`quantised.py` says which form a module has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nanoflow.graph.layers import MXFP4_GROUP
from nanoflow.models.checkpoint import StoredTensor, printable
from nanoflow.models.fields import ModelError, shown

FLOATING = ("F32", "F16", "BF16", "F64")
_SCALES = ("F32", "F16", "BF16")
_WORD_BITS = 32

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A tensor that a form needs.

    Attributes:
        shapes: Shapes that it may have.
        dtypes: Types that it may have.
        is_optional: Whether it may be absent.
        others: Further names, used if the checkpoint lacks the first.
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """The numbers themselves, in a floating-point type."""

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """The tensors of a part of this shape, by the last part of their names."""
        return {"weight": Need(shapes=(shape,), dtypes=FLOATING)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """The numbers themselves, of a stack of matrices [E, rows, columns] or of their biases [E, rows].

    Attributes:
        is_transposed: Whether each matrix is stored transposed.
        is_interleaved: Whether the rows of a matrix's halves alternate.
    """

    is_transposed: bool
    is_interleaved: bool

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """As `Plain.needs`."""
        stored = (shape[0], *reversed(shape[1:])) if self.is_transposed else shape
        return {"weight": Need(shapes=(stored,), dtypes=FLOATING)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4:
    """4 bits a weight of a stack of matrices: floating-point numbers, of which 32 in a row share a power of two.

    The first of two numbers is in the lower half of a byte (OCP Microscaling Formats, version 1.0, section 5).

    Attributes:
        is_interleaved: Whether the rows of a matrix's halves alternate.
    """

    is_interleaved: bool = False

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """As `Plain.needs`."""
        groups = _ceil(shape[-1], MXFP4_GROUP)
        return {
            "blocks": Need(shapes=((*shape[:-1], groups, MXFP4_GROUP // 2),), dtypes=("U8",)),
            "scales": Need(shapes=((*shape[:-1], groups),), dtypes=("U8",)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """One number of 8 bits for each weight, times a scale: of the tensor, of the row, or of a block.

    Attributes:
        dtype: "F8_E4M3" or "I8".
        block: Rows and columns that share a scale; None if a row or all rows do.
        has_zeros: Whether a row has a zero point, subtracted before the product with its scale.
    """

    dtype: str
    block: tuple[int, int] | None = None
    has_zeros: bool = False

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """As `Plain.needs`."""
        num_rows = shape[0]
        scales: tuple[Shape, ...] = ((num_rows, 1), (num_rows,), (), (1,), (1, 1))
        if self.block is not None:
            scales = (tuple(_ceil(size, per) for size, per in zip(shape, self.block, strict=True)),)
            # ModelOpt keeps the dimensions within a block, of size 1.
            scales = (*scales, (scales[0][0], 1, scales[0][1], 1))
        needs = {
            "weight": Need(shapes=(shape,), dtypes=(self.dtype,)),
            "weight_scale": Need(shapes=scales, dtypes=_SCALES, others=("weight_scale_inv",)),
        }
        zeros = Need(shapes=scales, dtypes=("I8",))
        return {**needs, "weight_zero_point": zeros} if self.has_zeros else needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """4 bits a weight: columns of the transposed matrix in words of eight, in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    group_size: int

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """As `Plain.needs`."""
        rows, columns = shape
        groups = _ceil(columns, self.group_size)
        return {
            "qweight": Need(shapes=((columns, rows // 8),), dtypes=("I32",)),
            "qzeros": Need(shapes=((groups, rows // 8),), dtypes=("I32",)),
            "scales": Need(shapes=((groups, rows),), dtypes=_SCALES),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """4 or 8 bits a weight: rows of the transposed matrix in words, the lowest bits first.

    Attributes:
        bits: Of a weight.
        group_size: Columns that share scale and zero point.
        zero_offset: Added to stored zero points: 1 in the first version of the format, 0 in the second.
        is_ordered: Whether the group of each column must be stored, since columns were quantised in another order.
    """

    bits: int
    group_size: int
    zero_offset: int
    is_ordered: bool

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """As `Plain.needs`."""
        rows, columns = shape
        groups, per_word = _ceil(columns, self.group_size), _WORD_BITS // self.bits
        return {
            "qweight": Need(shapes=((columns // per_word, rows),), dtypes=("I32",)),
            "qzeros": Need(shapes=((groups, rows // per_word),), dtypes=("I32",)),
            "scales": Need(shapes=((groups, rows),), dtypes=_SCALES),
            "g_idx": Need(shapes=((columns,),), dtypes=("I32",), is_optional=not self.is_ordered),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """4 or 8 bits a weight, of compressed-tensors: columns in words, the lowest bits first, all numbers unsigned.

    Attributes:
        bits: Of a weight.
        group_size: Columns that share a scale; None if a row or all rows do.
        has_zeros: Whether zero points are stored; else the middle of the range is 0.
        is_ordered: Whether the group of each column must be stored.
    """

    bits: int
    group_size: int | None
    has_zeros: bool
    is_ordered: bool = False

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """As `Plain.needs`."""
        rows, columns = shape
        per_word = _WORD_BITS // self.bits
        groups = 1 if self.group_size is None else _ceil(columns, self.group_size)
        scales: tuple[Shape, ...] = ((rows, groups),)
        scales = (*scales, (1,), ()) if self.group_size is None and not self.has_zeros else scales
        needs = {
            "weight_packed": Need(shapes=((rows, _ceil(columns, per_word)),), dtypes=("I32",)),
            "weight_scale": Need(shapes=scales, dtypes=_SCALES),
            "weight_shape": Need(shapes=((2,),), dtypes=("I64", "I32"), is_optional=True),
            "weight_g_idx": Need(shapes=((columns,),), dtypes=("I32",), is_optional=not self.is_ordered),
        }
        zeros = Need(shapes=((_ceil(rows, per_word), groups),), dtypes=("I32",))
        return {**needs, "weight_zero_point": zeros} if self.has_zeros else needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A tensor of a GGUF file: rows of blocks, of a type that `ggml.py` lists.

    Attributes:
        dtype: As "Q4_K".
        num_rotated_heads: Heads whose rows are stored in another order, in which the two halves of a rotated head
            alternate; None if rows are in order.
        shift: Added to every number.
    """

    dtype: str
    num_rotated_heads: int | None = None
    shift: float = 0.0

    def needs(self, shape: Shape) -> Mapping[str, Need]:
        """As `Plain.needs`."""
        return {"weight": Need(shapes=(shape,), dtypes=(self.dtype,))}


Form = Plain | Stacked | Mxfp4 | Scaled | Awq | Gptq | Packed | Blocks
FormOf = Callable[[str], Form | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A part of a parameter as a checkpoint has it.

    Attributes:
        name: Of the part, as "model.layers.0.self_attn.q_proj.weight".
        form: How its rows are read.
        shape: What it represents.
        tensors: What it consists of, by the last part of the names.
        names: The whole names of these in the checkpoint.
    """

    name: str
    form: Form
    shape: Shape
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)

    @property
    def main(self) -> StoredTensor:
        """The tensor with the weights."""
        return next(iter(self.tensors.values()))

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())


def tensor_names(name: str, form: Form, shape: Shape, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The names of the tensors of a part, by their last parts; an optional one is left out if it is absent."""
    if isinstance(form, Plain | Stacked | Blocks):
        return {"weight": name}
    if isinstance(form, Mxfp4):
        return {role: f"{name}_{role}" for role in form.needs(shape)}
    module, dot, _ = name.rpartition(".")
    names: dict[str, str] = {}
    for role, need in form.needs(shape).items():
        known = [f"{module}{dot}{each}" for each in (role, *need.others)]
        found = next((each for each in known if each in stored), None)
        if found is not None or not need.is_optional:
            names[role] = found or known[0]
    return names


def stored_part(name: str, form: Form, shape: Shape, stored: Mapping[str, StoredTensor], *, by: str) -> Stored:
    """A part whose tensors are all there.

    Args:
        name: Of the part.
        form: How it is stored.
        shape: What it represents.
        stored: The checkpoint.
        by: The file that shapes follow from, for messages.

    Raises:
        ModelError: A tensor has another shape or type than the form says.
    """
    names = tensor_names(name, form, shape, stored)
    needs = form.needs(shape)
    per_word = 8 if isinstance(form, Awq) else _WORD_BITS // form.bits if isinstance(form, Gptq) else 1
    if any(size % per_word for size in shape):
        raise ModelError(f"{name}: shape {shape} by {by} is no multiple of {per_word}, the numbers in a word")
    for role, each in names.items():
        tensor, need = stored[each], needs[role]
        where = f"{tensor.path}: {printable(each)}"
        if tensor.shape not in need.shapes:
            raise ModelError(f"{where} has shape {shown(tensor.shape)}, expected {need.shapes[0]} by {by}")
        if tensor.dtype not in need.dtypes:
            raise ModelError(f"{where} has type {tensor.dtype}, expected {_one_of(need.dtypes)}")
    return Stored(
        name=name, form=form, shape=shape, tensors={role: stored[each] for role, each in names.items()}, names=names
    )


def _one_of(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _ceil(size: int, per: int) -> int:
    return -(-size // per)
