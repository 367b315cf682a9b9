"""Which parameters of a model a checkpoint stores in FP8 in a form that can be multiplied as it is. No torch.

`stored.py` knows the forms; `fp8.py` the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nanoflow.graph.fp8 import fp8_candidates
from nanoflow.graph.graph import Fp8, OpGraph
from nanoflow.graph.layers import FP8_BLOCK
from nanoflow.models.contents import Contents, parts_of
from nanoflow.models.stored import Scaled, Stored


def fp8_of(part: Stored) -> Fp8 | None:
    """How a part can be kept as it is stored; None if it is in another form than FP8."""
    form = part.form
    return Fp8(block=form.block) if isinstance(form, Scaled) and form.dtype == "F8_E4M3" else None


def kept_as_stored(graph: OpGraph, contents: Contents) -> Mapping[str, Fp8]:
    """How parameters are kept, by name, as far as all of their parts in all layers are stored in one form of FP8.

    Blocks must be those that kernels know, and each part must end with a block.
    """
    found: dict[str, Fp8] = {}
    for name in fp8_candidates(graph):
        parts = list(_parts(graph, contents, name))
        forms = {fp8_of(part) for part in parts}
        (form, *others) = forms
        if form is None or others or form.block not in (None, FP8_BLOCK):
            continue
        if form.block is None or not any(part.shape[0] % form.block[0] for part in parts):
            found[name] = form
    return found


def _parts(graph: OpGraph, contents: Contents, name: str) -> Iterator[Stored]:
    for layer, kind in enumerate(graph.layers):
        for parameter in kind.parameters:
            if parameter.name == name:
                yield from (contents.parts[part] for part, _ in parts_of(parameter, contents.names, layer=layer))
