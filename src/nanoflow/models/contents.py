"""Compares a checkpoint with the graph that needs it, from the headers of its files: which tensors make each part.

Nothing is loaded, and no torch is needed. `checkpoint.py` lists what safetensors files hold, `gguf_model.py` what a
GGUF file holds; `weights.py` loads the parts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nanoflow.graph.graph import OpGraph, Parameter, ParameterPart
from nanoflow.models.checkpoint import StoredTensor, printable, read_checkpoint
from nanoflow.models.fields import ModelError, read_object
from nanoflow.models.gguf_file import is_gguf
from nanoflow.models.gguf_model import GgufModel, open_gguf
from nanoflow.models.quantised import Quantisation, quantisation_of
from nanoflow.models.stored import FLOATING, Blocks, Form, Mxfp4, Plain, Stacked, Stored, stored_part, tensor_names

_NUM_NAMED = 3
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\..*")
_WEIGHT = ".weight"
# Scales of activations, and of keys and values: they serve computation in 8 bits.
_KV_SCALE = re.compile(r".*\.(?:k_scale|v_scale|kv_scale|k_zero_point|v_zero_point)")
_ACTIVATION_SCALE = re.compile(r".*\.(?:input_scale|input_scale_ub|input_zero_point|activation_scale)")
# Tensors that there are only beside quantised weights, of any method.
_QUANTISED = re.compile(
    r".*\.(?:qweight|qzeros|q_weight|weight_packed|weight_scale|weight_scale_inv|weight\.absmax|weight\.quant_map|SCB"
    r"|codebooks|\w+_blocks)"
)
_UNUSED = re.compile(
    r".*\.(?:output_scale|output_zero_point|q_scale|prob_output_scale)"
    f"|{_ACTIVATION_SCALE.pattern}|{_KV_SCALE.pattern}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The parts of a graph's parameters in a checkpoint.

    Attributes:
        parts: By the names that the graph has for them (`parts_of`).
        title: In which form weights are stored, if not as plain numbers in safetensors; else None.
        has_kv_scales: Whether there are scales for keys and values, which are not used.
        has_activation_scales: Whether there are scales for the inputs of products, which are not used.
        names: All tensors of the checkpoint.
    """

    parts: Mapping[str, Stored]
    title: str | None
    has_kv_scales: bool
    has_activation_scales: bool
    names: frozenset[str]

    def described(self, served: str, num_bytes: int) -> str | None:
        """One line on what is stored and what is served (as which type); None if there is nothing to say."""
        if self.title is None:
            return None
        unused = "; scales of keys and values in it are not used" if self.has_kv_scales else ""
        return f"weights are stored as {self.title} and served as {served}: {num_bytes / 2**30:.2f} GiB{unused}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checkpoint:
    """A checkpoint whose form is known.

    Attributes:
        path: Folder or file.
        stored: All tensors by name.
        by: Where shapes come from, for messages.
        quantisation: Of safetensors.
        gguf: Of a GGUF file.
    """

    path: Path
    stored: Mapping[str, StoredTensor]
    by: str
    quantisation: Quantisation | None = None
    gguf: GgufModel | None = None

    def form_of(self, name: str, part: ParameterPart) -> Form:
        """How a part is stored: as it lies there if that is plain, else as config.json says."""
        tensor = self.stored.get(name)
        if self.gguf is not None:
            return self.gguf.form_of(name, tensor)
        if part.is_transposed or part.is_interleaved:
            return self._form_of_stack(name, part)
        if self.quantisation is None or not name.endswith(_WEIGHT) or len(part.shape) != 2:
            return Plain()
        if tensor is not None and tensor.dtype in FLOATING:
            return Plain()
        form = self.quantisation.form_of(name.removesuffix(_WEIGHT))
        return Plain() if form is None or isinstance(form, Mxfp4) else form

    def _form_of_stack(self, name: str, part: ParameterPart) -> Form:
        """How the matrices or biases of all experts are stored that lie in one tensor in an order of their own."""
        form = self.quantisation and self.quantisation.form_of(name)
        if isinstance(form, Mxfp4) and part.is_transposed and name not in self.stored:
            return replace(form, is_interleaved=part.is_interleaved)
        return Stacked(is_transposed=part.is_transposed, is_interleaved=part.is_interleaved)


def read_contents(graph: OpGraph, path: Path) -> Contents:
    """The parts of a graph's parameters in a folder or a GGUF file.

    Raises:
        ModelError: A file is missing or corrupt, or tensors are missing, unknown, or of another shape or type.
    """
    checkpoint = _open(path)
    stored = checkpoint.stored
    expected = dict(_expected(graph, stored))
    forms = {name: checkpoint.form_of(name, part) for name, part in expected.items()}
    needed = {name: tensor_names(name, forms[name], part.shape, stored) for name, part in expected.items()}
    _check_names(graph, checkpoint, needed)
    parts = {
        name: stored_part(name, forms[name], part.shape, stored, by=checkpoint.by) for name, part in expected.items()
    }
    return Contents(
        parts=parts,
        title=_title(checkpoint, parts),
        has_kv_scales=checkpoint.quantisation is not None and any(map(_KV_SCALE.fullmatch, stored)),
        has_activation_scales=checkpoint.quantisation is not None and any(map(_ACTIVATION_SCALE.fullmatch, stored)),
        names=frozenset(stored),
    )


def parts_of(
    parameter: Parameter, stored: Container[str], *, layer: int | None = None
) -> Iterator[tuple[str, ParameterPart]]:
    """What a checkpoint has for a parameter, by name, up to the form it is stored in.

    That is one tensor for the whole parameter if the checkpoint has it, else one for each part.

    Args:
        parameter: The parameter.
        stored: Names of the checkpoint's tensors.
        layer: Its layer; None outside the layers.
    """
    whole = parameter.whole and parameter.whole.format(layer=layer)
    if whole is not None and whole in stored:
        yield whole, ParameterPart(source=whole, shape=parameter.shape)
        return
    for part in parameter.parts:
        name, other = (source and source.format(layer=layer) for source in (part.source, part.other_source))
        assert name is not None
        yield other if other is not None and name not in stored and other in stored else name, part


def _open(path: Path) -> _Checkpoint:
    if is_gguf(path):
        model = open_gguf(path)
        return _Checkpoint(path=path, stored=model.tensors, by="its metadata", gguf=model)
    return _Checkpoint(
        path=path,
        stored=read_checkpoint(path),
        by="config.json",
        quantisation=quantisation_of(path, read_object(path / "config.json")),
    )


def _title(checkpoint: _Checkpoint, parts: Mapping[str, Stored]) -> str | None:
    """What users call the form of the weights."""
    if checkpoint.gguf is None:
        is_plain = all(isinstance(part.form, Plain | Stacked) for part in parts.values())
        return None if checkpoint.quantisation is None or is_plain else checkpoint.quantisation.title
    sizes = Counter[str]()
    for part in parts.values():
        if isinstance(part.form, Blocks) and len(part.shape) > 1:
            sizes[part.form.dtype] += part.num_bytes
    return f"GGUF {' and '.join(name for name, _ in sizes.most_common())}"


def _expected(graph: OpGraph, stored: Container[str]) -> Iterator[tuple[str, ParameterPart]]:
    """Every part that the graph needs, by name."""
    for parameter in graph.parameters:
        yield from parts_of(parameter, stored)
    for layer, kind in enumerate(graph.layers):
        for parameter in kind.parameters:
            yield from parts_of(parameter, stored, layer=layer)


def _check_names(graph: OpGraph, checkpoint: _Checkpoint, needed: Mapping[str, Mapping[str, str]]) -> None:
    """Compare the names in the checkpoint with those that the graph needs."""
    stored, path = checkpoint.stored, checkpoint.path
    names = dict.fromkeys(name for of_part in needed.values() for name in of_part.values())
    missing = [name for name in names if name not in stored]
    if missing:
        why = _unsaid(checkpoint) or _layers(graph, stored)
        raise ModelError(f"{path} lacks {_listed(missing)} that {graph.name} needs{why}")
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in graph.ignored_sources))
    superfluous = [name for name in stored if name not in names and not ignored.fullmatch(name)]
    if checkpoint.quantisation is not None:
        superfluous = [name for name in superfluous if not (_UNUSED.fullmatch(name) or _is_nothing(name, stored))]
    if superfluous:
        why = _unsaid(checkpoint) or _layers(graph, stored)
        raise ModelError(f"{path} has {_listed(superfluous)} that {graph.name} has no place for{why}")


def _unsaid(checkpoint: _Checkpoint) -> str:
    """Why names differ, if weights are quantised and no file says how; else empty."""
    is_said = checkpoint.gguf is not None or checkpoint.quantisation is not None
    if is_said or not any(map(_QUANTISED.fullmatch, checkpoint.stored)):
        return ""
    return ": they are quantised, but config.json has no quantization_config; it must say how"


def _is_nothing(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    """True for biases and zero points that are 0 throughout: some tools write them for every module."""
    if not name.endswith((".bias", ".weight_zero_point")):
        return False
    tensor = stored[name]
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        return not any(file.read(tensor.end - tensor.start))


def _layers(graph: OpGraph, stored: Iterable[str]) -> str:
    """The expected and actual numbers of layers, if they differ; else empty."""
    found = {int(match[1]) for name in stored if (match := _LAYER.fullmatch(name))}
    num_layers = max(found, default=-1) + 1
    if num_layers == graph.num_layers:
        return ""
    return f": num_hidden_layers is {graph.num_layers} in config.json, the weights have {num_layers}"


def _listed(names: list[str]) -> str:
    """The first few names, and how many there are."""
    first = ", ".join(printable(name) for name in names[:_NUM_NAMED])
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({first}{more})"
