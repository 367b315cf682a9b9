"""The architectures: how each reads config.json, and which function makes its graph, with which options.

The keys are the class names in a config.json's `architectures`. See docs/adding-a-model.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanoflow.graph.graph import OpGraph
from nanoflow.models import gemma3, gpt_oss, llama, moe, readings
from nanoflow.models.fields import ModelError
from nanoflow.models.kinship import not_known
from nanoflow.models.model import ModelConfig
from nanoflow.models.readings import Reading

Builder = Callable[[ModelConfig, int | None], OpGraph]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """An architecture that is served.

    Attributes:
        reading: How it reads config.json.
        build: Makes its graph from the model description and the longest sequence served.
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
    "MixtralForCausalLM": Architecture(reading=readings.MIXTRAL, build=partial(moe.build, names=moe.MIXTRAL)),
    "Qwen2MoeForCausalLM": Architecture(reading=readings.QWEN2_MOE, build=moe.build),
    "Qwen3MoeForCausalLM": Architecture(reading=readings.QWEN3_MOE, build=partial(moe.build, has_qk_norm=True)),
    "GptOssForCausalLM": Architecture(reading=readings.GPT_OSS, build=gpt_oss.build),
}


def reading_of(architecture: str) -> Reading:
    """How a served architecture reads config.json."""
    return ARCHITECTURES[architecture].reading


def served_as(model_type: str) -> str | None:
    """The served architecture with this `model_type`; None if there is none."""
    return next((name for name, served in ARCHITECTURES.items() if served.reading.model_type == model_type), None)


def refusal(architecture: str | None, model_type: object, values: Mapping[str, Any]) -> str | None:
    """Error for a model that cannot be served; None if it can.

    Args:
        architecture: The class that config.json names; None if it has only a `model_type`.
        model_type: The field of this name, of any type.
        values: All fields of config.json.
    """
    if architecture in ARCHITECTURES:
        return None
    return not_known(architecture, model_type, values, list(ARCHITECTURES))


def build_graph(config: ModelConfig, max_model_len: int | None) -> OpGraph:
    """The graph of a model.

    Args:
        config: The model.
        max_model_len: Longest sequence served; None is the model's own limit.

    Raises:
        ModelError: The architecture is unknown, or needs something that is not supported.
    """
    if (reason := refusal(config.architecture, None, {})) is not None:
        raise ModelError(reason)
    return ARCHITECTURES[config.architecture].build(config, max_model_len)
