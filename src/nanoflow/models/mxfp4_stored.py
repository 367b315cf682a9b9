"""Which experts of a model are stored in MXFP4 in a form that can be multiplied as it is. No torch.

`stored.py` knows the forms; `mxfp4.py` how kernels take them.
"""

from __future__ import annotations

from collections.abc import Iterator

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.mxfp4 import mxfp4_candidates
from nanoflow.models.contents import Contents, parts_of
from nanoflow.models.stored import Mxfp4, Stored


def packed_as_stored(graph: OpGraph, contents: Contents) -> frozenset[str]:
    """Names of the parameters of which every part in every layer is stored in MXFP4."""
    return frozenset(
        name
        for name in mxfp4_candidates(graph)
        if all(isinstance(part.form, Mxfp4) for part in _parts(graph, contents, name))
    )


def _parts(graph: OpGraph, contents: Contents, name: str) -> Iterator[Stored]:
    for layer, kind in enumerate(graph.layers):
        for parameter in kind.parameters:
            if parameter.name == name:
                yield from (contents.parts[part] for part, _ in parts_of(parameter, contents.names, layer=layer))
