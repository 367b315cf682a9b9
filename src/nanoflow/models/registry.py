"""Which architectures there are: how each reads config.json, and which file writes its graph, with which traits.

The keys are the class names in a config.json's `architectures`. See docs/adding-a-model.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanoflow.graph.graph import OpGraph
from nanoflow.models import llama, readings
from nanoflow.models.fields import ModelError, shown
from nanoflow.models.model import ModelConfig
from nanoflow.models.readings import Reading

Builder = Callable[[ModelConfig, int | None], OpGraph]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A kind of model that is served.

    Attributes:
        reading: How it reads config.json.
        build: Writes its graph, given the longest sequence served.
    """

    reading: Reading
    build: Builder


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(reading=readings.LLAMA, build=llama.build),
    "MistralForCausalLM": Architecture(reading=readings.MISTRAL, build=llama.build),
    "Qwen2ForCausalLM": Architecture(reading=readings.QWEN2, build=partial(llama.build, has_qkv_bias=True)),
    "Qwen3ForCausalLM": Architecture(reading=readings.QWEN3, build=partial(llama.build, has_qk_norm=True)),
}
# Not served, but what they cost can be computed.
_ANALYSED: dict[str, Reading] = {"MixtralForCausalLM": readings.MIXTRAL}


def reading_of(architecture: str) -> Reading | None:
    """How an architecture reads config.json; None if it is not known."""
    served = ARCHITECTURES.get(architecture)
    return _ANALYSED.get(architecture) if served is None else served.reading


def served_as(model_type: str) -> str | None:
    """The architecture that a `model_type` of config.json stands for; None if none that is served."""
    return next((name for name, served in ARCHITECTURES.items() if served.reading.model_type == model_type), None)


def build_graph(config: ModelConfig, max_model_len: int | None) -> OpGraph:
    """The graph of a model.

    Args:
        config: The model.
        max_model_len: Longest sequence served; None is the model's own limit.

    Raises:
        ModelError: The architecture is not known, or asks for something that is not served.
    """
    if config.num_experts is not None:
        experts = f"{config.num_experts} experts a layer"
        raise ModelError(f"{config.architecture}: a mixture of experts ({experts}) is not served yet")
    if config.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"architecture {shown(config.architecture)} is not known; known: {known}")
    return ARCHITECTURES[config.architecture].build(config, max_model_len)
