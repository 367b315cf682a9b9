"""Which file writes the graph of which architecture, and which traits it has.

The keys are the class names in a config.json's `architectures`. See docs/adding-a-model.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nanoflow.graph.graph import OpGraph
from nanoflow.models import llama
from nanoflow.models.config import ModelConfig, ModelError

Builder = Callable[[ModelConfig, int | None], OpGraph]

ARCHITECTURES: dict[str, Builder] = {
    "LlamaForCausalLM": llama.build,
    "MistralForCausalLM": llama.build,
    "Qwen2ForCausalLM": partial(llama.build, has_qkv_bias=True),
    "Qwen3ForCausalLM": partial(llama.build, has_qk_norm=True),
}


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
        raise ModelError(f"architecture {config.architecture!r} is not known; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[config.architecture](config, max_model_len)
