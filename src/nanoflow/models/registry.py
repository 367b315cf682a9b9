"""Which architectures there are: how each reads config.json, and which file writes its graph, with which traits.

The keys are the class names in a config.json's `architectures`. See docs/adding-a-model.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanoflow.graph.graph import OpGraph
from nanoflow.models import gemma3, llama, readings
from nanoflow.models.fields import ModelError
from nanoflow.models.kinship import not_known
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
    "Phi3ForCausalLM": Architecture(reading=readings.PHI3, build=partial(llama.build, is_stored_fused=True)),
    "Gemma3ForCausalLM": Architecture(reading=readings.GEMMA3, build=gemma3.build),
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


def refusal(architecture: str | None, model_type: object, values: Mapping[str, Any], *, is_served: bool) -> str | None:
    """Why a model cannot be served, or, unless that is asked for, not even be analysed; None if it can.

    Args:
        architecture: The class that config.json names; None if it has only a `model_type`.
        model_type: As it stands there.
        values: The whole of config.json.
        is_served: Whether the model is to be served.
    """
    if architecture in ARCHITECTURES or (architecture in _ANALYSED and not is_served):
        return None
    return not_known(
        architecture, model_type, values, list(ARCHITECTURES), is_analysed=is_served and architecture in _ANALYSED
    )


def build_graph(config: ModelConfig, max_model_len: int | None) -> OpGraph:
    """The graph of a model.

    Args:
        config: The model.
        max_model_len: Longest sequence served; None is the model's own limit.

    Raises:
        ModelError: The architecture is not known, or asks for something that is not served.
    """
    fields = {"num_local_experts": config.num_experts}
    if (reason := refusal(config.architecture, None, fields, is_served=True)) is not None:
        raise ModelError(reason)
    return ARCHITECTURES[config.architecture].build(config, max_model_len)
