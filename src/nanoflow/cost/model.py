"""A model as far as costs go: the graph that one token passes, and the parameters in memory besides.

Mixtures of experts can be analyzed, but not served. A token passes `num_experts_per_token` experts, which cost as much
as one feed-forward block of their summed width; the other experts only cost memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape, LinearDims, Operation
from nanoflow.models.config_json import ModelConfig, ModelError
from nanoflow.models.registry import build_graph

_EXPERT_WEIGHTS = frozenset({"gate_up_proj.weight", "down_proj.weight"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts: how many a layer has, and how many of them a token passes."""

    num_experts: int
    num_per_token: int

    def num_touched(self, num_tokens: int) -> float:
        """Expected experts of a layer that a batch needs, if the router chooses them uniformly at random."""
        return self.num_experts * (1.0 - (1.0 - self.num_per_token / self.num_experts) ** num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostedModel:
    """A model in 16-bit numbers.

    Attributes:
        graph: The operations that one token passes; its experts are one feed-forward block.
        experts: None for a dense model.
        dtype_bytes: Bytes of a weight, an activation, a key or a value.
    """

    graph: OpGraph
    experts: Experts | None = None
    dtype_bytes: int = 2

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token passes (P_model in the paper's FLOPs), routers included."""
        return self.graph.num_parameters + self._num_router_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters in memory."""
        if self.experts is None:
            return self.graph.num_parameters
        num_idle = self.experts.num_experts - self.experts.num_per_token
        of_token = sum(_num_weights(op) for op in self.graph.layer if _is_expert(op))
        return self.num_active_parameters + self.graph.num_layers * of_token * num_idle // self.experts.num_per_token

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.num_parameters * self.dtype_bytes

    def kv_bytes(self, context: float) -> float:
        """Bytes of keys and values that a request of so many tokens keeps; under a window, only of those inside it."""
        elements = 0.0
        for group in self.graph.kv_groups:
            elements += group.elements_per_token * (context if group.window is None else min(context, group.window))
        return elements * self.dtype_bytes

    def memory_bytes(self, op: Operation, shape: BatchShape) -> int:
        """Bytes that an operation of one layer moves, with the weights of every expert that the batch needs."""
        moved = op.memory_bytes(shape, self.dtype_bytes)
        if self.experts is None or not _is_expert(op):
            return moved
        num_others = self.experts.num_touched(shape.num_tokens) / self.experts.num_per_token - 1.0
        return moved + round(num_others * _num_weights(op) * self.dtype_bytes)

    @property
    def _num_router_parameters(self) -> int:
        if self.experts is None:
            return 0
        width = next(op.dims.in_features for op in self.graph.layer if isinstance(op.dims, LinearDims))
        return self.graph.num_layers * width * self.experts.num_experts


def costed_model(config: ModelConfig) -> CostedModel:
    """The costs of a model, dense or of Mixtral's kind.

    Raises:
        ModelError: The architecture is unknown.
    """
    if config.num_experts is None or config.num_experts_per_token is None:
        return CostedModel(graph=build_graph(config, None))
    if config.architecture != "MixtralForCausalLM":
        # Other architectures have shared experts, or experts of another width than `intermediate_size`.
        raise ModelError(f"{config.architecture}: of the mixtures of experts only MixtralForCausalLM is known")
    experts = Experts(num_experts=config.num_experts, num_per_token=config.num_experts_per_token)
    dense = replace(
        config,
        architecture="MistralForCausalLM",
        intermediate_size=config.intermediate_size * experts.num_per_token,
        num_experts=None,
        num_experts_per_token=None,
    )
    model = CostedModel(graph=build_graph(dense, None), experts=experts)
    return replace(model, graph=replace(model.graph, name=f"{config.architecture} {model.num_parameters / 1e9:.1f}B"))


def _is_expert(op: Operation) -> bool:
    return not _EXPERT_WEIGHTS.isdisjoint(op.weights)


def _num_weights(op: Operation) -> int:
    assert isinstance(op.dims, LinearDims)
    return op.dims.in_features * op.dims.out_features
