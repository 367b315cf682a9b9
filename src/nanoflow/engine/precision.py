"""Which products of a model multiply in FP8: what the user asks for, what is stored, and what the device can.

Everything else has the type that `dtype` says. `graph/fp8.py` changes the graph, `models/placing.py` the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.fp8 import fp8_candidates, with_fp8
from nanoflow.graph.graph import Fp8, OpGraph
from nanoflow.graph.operation import KvType
from nanoflow.kernels.dispatch import multiplies_fp8
from nanoflow.models.config_json import ModelConfig
from nanoflow.models.contents import Contents
from nanoflow.models.fp8_stored import kept_as_stored
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import check_weights


def graph_of(
    config: EngineConfig,
    model_config: ModelConfig,
    folder: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[OpGraph, str | None]:
    """The graph that a model is served by, its products not yet fused, and a line on its weights: `served_graph`.

    Args:
        config: Options.
        model_config: The model.
        folder: Its folder or GGUF file, whose headers are checked; None for a preset.
        dtype, device: As `served_graph` has them.

    Raises:
        ConfigError, ModelError: The model does not fit its checkpoint, or neither it nor the device has FP8.
    """
    graph = build_graph(model_config, config.max_model_len).with_kv_type(KvType(config.kv_cache_dtype))
    contents = None if folder is None or config.load_format == "random" else check_weights(graph, folder)
    return served_graph(config, graph, contents, dtype, device)


def served_graph(
    config: EngineConfig, graph: OpGraph, contents: Contents | None, dtype: torch.dtype, device: torch.device
) -> tuple[OpGraph, str | None]:
    """The graph that is served, and a line on its weights if there is something to say.

    Args:
        config: Options.
        graph: The model, all in one type.
        contents: Its checkpoint; None if weights are drawn at random.
        dtype: Type of activations, and of all weights that are not in FP8.
        device: Where it runs.

    Raises:
        ConfigError: FP8 is asked for, and neither model nor device have it.
    """
    stored = {} if contents is None else kept_as_stored(graph, contents)
    can_multiply = multiplies_fp8(device, dtype)
    weights: Mapping[str, Fp8] = {}
    if config.quantization == "fp8":
        if device.type == "cuda" and not can_multiply:
            raise ConfigError(
                "quantization fp8 needs a GPU of compute capability 9.0 or later (Hopper) and a dtype of 16 bits, "
                f"this is {_name(dtype)} on {torch.cuda.get_device_name(device)}: use quantization none"
            )
        weights = {name: stored.get(name, Fp8()) for name in fp8_candidates(graph)}
        if not weights:
            raise ConfigError(f"quantization fp8: {graph.name} has no products of sizes that suit it")
    elif config.quantization == "auto" and can_multiply:
        weights = stored
    served = with_fp8(graph, weights)
    num_bytes = served.parameter_bytes(dtype.itemsize)
    if contents is None or contents.title is None:
        if not weights:
            return served, None
        size = f"{num_bytes / 2**30:.2f} GiB"
        done = f"weights are quantised to FP8 (a scale for each row) where they can be, else {_name(dtype)}: {size}"
        return served, f"{done}{_left_out(served, dtype)}"
    line = contents.described(f"FP8 and {_name(dtype)}" if weights else _name(dtype), num_bytes)
    if weights and contents.has_activation_scales:
        line = f"{line}; rows of activations get scales of their own, those in it are not used"
    if stored and config.quantization == "auto" and not can_multiply:
        line = f"{line}; products in FP8 need a GPU from Hopper on"
    return served, f"{line}{_left_out(served, dtype)}" if weights else line


def _left_out(graph: OpGraph, dtype: torch.dtype) -> str:
    """What is said of experts that no kernel multiplies in FP8; empty if there are none."""
    has_biases = any(isinstance(op.dims, ExpertDims) and not op.dims.is_plain for op in graph.layer_operations)
    return f"; experts with biases stay in {_name(dtype)}" if has_biases else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
