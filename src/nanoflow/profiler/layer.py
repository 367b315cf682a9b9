"""A layer's operations one after the other, as a plan without overlap runs them: what gaps between them take."""

from __future__ import annotations

import torch

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import Operation, OpKind
from nanoflow.models.weights import random_weights
from nanoflow.profiler.site import Site, equal_requests, over_layers, random_workspace, shortened, writes_indices
from nanoflow.profiler.sustained import Span, sustained


@torch.inference_mode()
def measure_layer(site: Site, num_tokens: int, num_requests: int, span: Span | None = None) -> float:
    """Seconds of one layer on a batch of equal prefill requests without keys before them."""
    batch = equal_requests(num_requests, 0, num_tokens // num_requests, site.page_size)
    elements = min(sum(each.num_elements for each in kind.parameters) for kind in site.graph.kinds)
    graph = shortened(site.graph, elements * site.dtype.itemsize)
    weights = random_weights(graph, site.dtype, site.device, seed=0)
    workspace = random_workspace(
        site, graph, weights, num_pages=len(batch.new_pages), num_tokens=num_tokens, num_rows=1
    )
    work = over_layers(workspace, lambda op: is_measured(graph, op), batch)
    return sustained(work, site.device, span).time_s / graph.num_layers


def is_measured(graph: OpGraph, op: Operation) -> bool:
    """Whether an operation is part of the layer that is measured.

    Decode attention is not, as there are no decodes; nor is what chooses experts, as they are those of the profile.
    """
    return op.kind is not OpKind.DECODE_ATTENTION and not writes_indices(graph, op)
