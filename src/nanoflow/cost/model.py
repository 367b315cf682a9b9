"""A model as far as costs go: its graph, in 16-bit numbers, FP8 or MXFP4, and how evenly its experts are chosen.

What an operation costs is in `graph/operation.py`, and in `graph/experts.py` for experts: a token passes few of them,
and a batch reads the weights of all that its tokens pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.mxfp4 import in_mxfp4
from nanoflow.graph.operation import KvType
from nanoflow.models.config_json import ModelConfig
from nanoflow.models.moe import with_skew
from nanoflow.models.registry import build_graph


@dataclass(frozen=True, slots=True, kw_only=True)
class CostedModel:
    """A model in 16-bit numbers, except for the weights that its graph has in FP8 or MXFP4.

    Attributes:
        graph: Its operations.
        dtype_bytes: Bytes of a weight or an activation; those of keys and values follow from the graph.
    """

    graph: OpGraph
    dtype_bytes: int = 2

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token passes (P_model in the paper's FLOPs), routers included."""
        return self.graph.num_active_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters in memory."""
        return self.graph.num_parameters

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.graph.parameter_bytes(self.dtype_bytes)

    @property
    def num_fp8_parameters(self) -> int:
        """Parameters in FP8."""
        return self.graph.num_fp8_parameters

    @property
    def num_active_fp8_parameters(self) -> int:
        """Those of them that one token passes."""
        return self.graph.num_active_fp8_parameters

    def kv_bytes(self, context: float) -> float:
        """Bytes of keys and values that a request of so many tokens keeps; under a window, only of those inside it."""
        return sum(
            group.bytes_per_token(self.dtype_bytes) * (context if group.window is None else min(context, group.window))
            for group in self.graph.kv_groups
        )


def costed_model(
    config: ModelConfig,
    expert_skew: float = 0.0,
    kv_type: KvType = KvType.MODEL,
    *,
    is_fp8: bool = False,
    is_mxfp4: bool = False,
) -> CostedModel:
    """The costs of a model.

    Args:
        config: The model.
        expert_skew: How unevenly its tokens choose experts (`Routing.skew`); without effect on a dense model.
        kv_type: Type of keys and values in the cache.
        is_fp8: Whether products of layers multiply FP8.
        is_mxfp4: Whether weights of experts are in MXFP4.

    Raises:
        ModelError: The architecture is unknown.
        GraphError: It has no experts that could be in MXFP4.
    """
    graph = with_skew(build_graph(config, None).with_kv_type(kv_type), expert_skew)
    graph = in_fp8(graph) if is_fp8 else graph
    return CostedModel(graph=in_mxfp4(graph) if is_mxfp4 else graph)
